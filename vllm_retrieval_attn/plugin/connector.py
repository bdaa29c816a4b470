# SPDX-License-Identifier: Apache-2.0
"""The KV connector: carries epochs from the scheduler to the worker, and failures back.

vLLM makes one object in EngineCore (scheduler half) and one in each worker (worker half). K and V
themselves move inside the attention layer, not through the connector's layer hooks.
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vllm_retrieval_attn.core.ledger import HostLedger
from vllm_retrieval_attn.core.options import SearchOptions, search_options
from vllm_retrieval_attn.core.prefixes import Prefixes
from vllm_retrieval_attn.plugin.compat import GRAPHS_KEY
from vllm_retrieval_attn.plugin.line import WaitingLine
from vllm_retrieval_attn.plugin.manager import RetrievalManager
from vllm_retrieval_attn.plugin.messages import StepMessage, WorkerReport
from vllm_retrieval_attn.plugin.metric_names import key
from vllm_retrieval_attn.plugin.prefix_reuse import PrefixReuse
from vllm_retrieval_attn.plugin.prometheus import RetrievalMetrics
from vllm_retrieval_attn.plugin.request_log import RequestLog
from vllm_retrieval_attn.plugin.resolved import resolved_config
from vllm_retrieval_attn.plugin.spec import RetrievalSpec
from vllm_retrieval_attn.plugin.stats import SCHEDULER, RetrievalStats

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from vllm_retrieval_attn.plugin.worker import RetrievalWorker

logger = logging.getLogger("vllm.retrieval")


class RetrievalConnector(KVConnectorBase_V1, SupportsHMA):
    """Filled into ``kv_transfer_config`` when the backend is selected; not meant to be named by users."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        from vllm_retrieval_attn.plugin.arena_layout import with_block_size
        from vllm_retrieval_attn.plugin.worker import RetrievalWorker

        config = with_block_size(resolved_config(vllm_config), kv_cache_config)
        self._config = config
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self._group = next(i for i, spec in enumerate(specs) if isinstance(spec, RetrievalSpec))
        self._worker: RetrievalWorker | None = None
        prefixes, caching = None, vllm_config.cache_config.enable_prefix_caching and config.host_pages > 0
        if caching and config.sink_slots and len(specs) == 1:
            prefixes = Prefixes(config.split, config.page_tokens, config.sink_slots)
        elif caching and role == KVConnectorRole.SCHEDULER:
            why = f"host memory of {config.host_pages} pages is too little to keep prefixes in"
            if len(specs) > 1:  # whose K and V are not on the host
                why = "this model has sliding-window layers"
            logger.info("retrieval: every prompt is computed from its begin: %s", why)
        self._ledger = HostLedger(config.host_pages, config.page_tokens, config.split, prefixes)
        longest, events = vllm_config.model_config.max_model_len, vllm_config.kv_events_config
        wants_events = events is not None and events.enable_kv_cache_events
        self._reuse = PrefixReuse(self._ledger, config, longest, wants_events)
        self.line = WaitingLine(self._ledger, longest, self._reuse.match)
        self._epochs: dict[str, int] = {}
        self._admissions = 0
        self._released: list[tuple[str, int]] = []
        self._options: dict[str, SearchOptions] = {}
        self.log = RequestLog(config, self._ledger, self._group)
        self.filled = False
        """Whether prompts of requests that may need the host count as computed (bench/fill.py)."""
        if role == KVConnectorRole.WORKER:
            self._worker = RetrievalWorker(vllm_config, config, kv_cache_config)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        # On a CPU, and with index "none", nothing is captured whole.
        return not extra_config.get(GRAPHS_KEY, False)

    @property
    def requires_kv_delivery(self) -> bool:
        # Nothing is handed to another engine. But a preempted request then drops what it has in flight and samples it
        # again, without which vLLM 0.32 loses a session whose in-flight token ends a chunk (async scheduling).
        return True

    # ---- scheduler half

    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        managers = [
            manager
            for manager in kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, RetrievalManager)
        ]
        managers[0].ledger = self._ledger

    def on_new_request(self, request: "Request") -> None:
        longest = request.num_prompt_tokens + request.max_tokens
        if getattr(request, "resumable", False):
            longest = self._vllm_config.model_config.max_model_len
        self._ledger.arrived(request.request_id, longest)
        self.line.arrived(request)
        self._reuse.arrived(request)
        self.log.arrived(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        if self.filled and self._ledger.needs_host(request.request_id):
            return max(0, request.num_tokens - 1 - num_computed_tokens), False
        return self._reuse.tokens(request), False

    def update_state_after_alloc(self, request: "Request", blocks: Any, num_external_tokens: int) -> None:
        """vLLM schedules a request from its waiting queue: a new one, a preempted one, or a session's next chunk."""
        name = request.request_id
        anew = request.num_computed_tokens == 0  # its KV is gone or was never there; a session keeps it
        if anew:
            self._admissions += 1  # never the same twice, so that a request's id may be
            self._epochs[name] = self._admissions
        params = request.sampling_params
        options = search_options(
            self._config, params.extra_args if params is not None else None, params.seed if params is not None else None
        )
        self.log.admitted(name, options, num_external_tokens if anew else None)
        self._reuse.admitted(request, self._epochs[name], blocks.get_block_ids()[self._group], anew)
        if not anew or options != search_options(self._config, None):
            self._options[name] = options

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        message = StepMessage(options=self._options, released=self._released)
        self._options, self._released = {}, []
        self.line.step_ends()
        # So that start_load_kv comes before the forward pass: a graph's descriptor is sent there.
        scheduler_output.has_sync_kv_loads = self._config.hosted
        scheduled = scheduler_output.num_scheduled_tokens
        for request_id in scheduled:
            if self._ledger.needs_host(request_id):
                message.admitted[request_id] = self._epochs[request_id]
            else:
                message.resident.add(request_id)
        self._reuse.scheduled(scheduler_output, message)
        for request_id in scheduler_output.preempted_req_ids or ():
            # Admitted again in the same step: the newer epoch tells the worker.
            if request_id not in scheduled and request_id in self._epochs:
                message.released.append((request_id, self._epochs[request_id]))
        return message

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """What the request held, for the response's ``kv_transfer_params``; blocks are freed at once."""
        report = self.log.ended(request, block_ids)
        # Not in finished_req_ids' time: a new request may have the id by then.
        self._ledger.forget(request.request_id)
        self._released.append((request.request_id, self._epochs.pop(request.request_id, 0)))
        self.line.left(request.request_id)
        self._reuse.left(request.request_id)
        return False, {"retrieval": report}

    def take_events(self) -> Iterable["KVCacheEvent"]:
        return self._reuse.take_events()

    def reset_cache(self) -> bool | None:
        self._reuse.reset()
        return True

    # ---- both halves

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._worker is not None:
            stats: KVConnectorStats | None = self._worker.take_stats()
            return stats
        told, (now, more) = self.log.take_stats(), self._reuse.take_stats()
        more[key("requests_failed", "outgrown")] = self.line.take_outgrown()
        stats = RetrievalStats.of(SCHEDULER, {**told.pop("now", {}), **now}, more, **told)
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return RetrievalStats(data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: "VllmConfig", metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVConnectorPromMetrics | None:
        return RetrievalMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- worker half

    @property
    def worker(self) -> "RetrievalWorker":
        assert self._worker is not None, "only the worker half has it"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, "torch.Tensor"]) -> None:
        self.worker.register_kv_caches(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMessage)
        self.worker.begin_step(connector_metadata)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self.worker.end_step()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if (metadata := kwargs.get("attn_metadata")) is not None:  # vLLM hands it over before it replays a graph alone
            self.worker.begin_graph(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def finish_forward(self) -> None:
        self.worker.finish_forward()

    def wait_for_save(self) -> None:
        self.worker.fence_mirror()

    def build_connector_worker_meta(self) -> WorkerReport | None:
        return self.worker.report()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
