# SPDX-License-Identifier: Apache-2.0
"""The worker half: owns the arena, the ring and the actors of a rank, and the state of a step."""

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vllm_retrieval_attn.core.options import SearchOptions, search_options
from vllm_retrieval_attn.device.asking import Asking
from vllm_retrieval_attn.device.fidelity import DecodeSampler
from vllm_retrieval_attn.device.plan import StepPlan, make_plan
from vllm_retrieval_attn.plugin.ahead import may_attend, needs_workers
from vllm_retrieval_attn.plugin.answers import Answers
from vllm_retrieval_attn.plugin.arena_layout import arena_layout, retrieval_layers, summary, with_block_size
from vllm_retrieval_attn.plugin.compat import patch_runner
from vllm_retrieval_attn.plugin.identity import model_identity
from vllm_retrieval_attn.plugin.messages import StepMessage, WorkerReport
from vllm_retrieval_attn.plugin.metric_names import key
from vllm_retrieval_attn.plugin.model_space import ModelSpace
from vllm_retrieval_attn.plugin.poison import poison_left_blocks
from vllm_retrieval_attn.plugin.prefix_pages import PrefixPages
from vllm_retrieval_attn.plugin.worker_stats import WorkerStats
from vllm_retrieval_attn.sketch.space import LEARNED
from vllm_retrieval_attn.store.arena import Arena
from vllm_retrieval_attn.store.space_file import space_path
from vllm_retrieval_attn.workers.client import RingClient
from vllm_retrieval_attn.workers.pool import WorkerPool
from vllm_retrieval_attn.workers.sync import check_platform

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_retrieval_attn.core.config import ResolvedConfig
    from vllm_retrieval_attn.plugin.metadata import RetrievalMetadata
    from vllm_retrieval_attn.store.requests import RequestStore

logger = logging.getLogger("vllm.retrieval")

_current: "RetrievalWorker | None" = None


def current_worker() -> "RetrievalWorker | None":
    """The worker half of this process; None before the KV cache exists (profiling run)."""
    return _current


class RetrievalWorker:
    """Host side of one tensor-parallel rank.

    Attributes:
        rank: in its tensor-parallel group.
        hosted: False with index ``none``, which has none of the following.
        arena, client, pool: the host side. cuda: its GPU half, None on CPU. sketch: codes on the GPU, None without.
        asking: steps in which a graph asks the CPU workers, None on CPU and with a sketch.
        answers: of the CPU workers.
        graph_steps: steps that replayed one graph. paged_steps: those of them without kernels for the host.
        needs_pieces: whether the step about to run may not be one graph: it is to be compared or, with a sketch, has
            work for the CPU workers.
        attends: whether any of its rows may attend to the host. paged: its graph has no kernels for that.
        sampler: of steps to compare with exact attention; None without an index. space: that codes are made in,
            likewise.
    """

    def __init__(self, vllm_config: "VllmConfig", config: "ResolvedConfig", kv_cache_config: "KVCacheConfig") -> None:
        global _current
        check_platform()
        patch_runner(vllm_config.use_v2_model_runner)
        self._layers = retrieval_layers(kv_cache_config)
        self.config = with_block_size(config, kv_cache_config)
        self._layer_numbers = {name: i for i, name in enumerate(self._layers)}
        self._names: list[str] = list(self._layers)
        self._message: StepMessage | None = None
        self._plan: StepPlan | None = None
        self._read: dict[str, tuple[int, int]] = {}
        self._metadata: list[RetrievalMetadata] = []
        self._kv_caches: dict[str, torch.Tensor] = {}
        self.rank = vllm_config.parallel_config.rank
        self.hosted = config.hosted
        self.sampler: DecodeSampler | None = None
        self.space: ModelSpace | None = None
        self._growth: list[tuple[Any, list[tuple[RequestStore, int]]]] = []
        self._written: Any = None
        self.sketch: Any = None
        self.asking: Asking | None = None
        self.needs_pieces, self.attends, self.paged = False, True, False
        self.graph_steps = self.paged_steps = 0
        if self.hosted:
            self._start_host(vllm_config)
        _current = self

    def _start_host(self, vllm_config: "VllmConfig") -> None:
        config = self.config
        layer = vllm_config.compilation_config.static_forward_context[self._names[0]]
        self._warm_up = lambda cache: layer.impl.warm_up(self, cache)
        dtype, layout = arena_layout(vllm_config, config, self._layers, layer.num_heads)
        self._default_options = search_options(config, None)
        self._options: dict[str, SearchOptions] = {}
        rank = self.rank
        sinks = config.sink_end, config.arena_pages - config.host_pages
        self.cuda: Any = None
        if vllm_config.device_config.device_type == "cuda":
            from vllm_retrieval_attn.device.cuda_host import CudaHost, memory_for
            from vllm_retrieval_attn.device.sketch import current_sketch

            device = torch.device("cuda", torch.cuda.current_device())
            self.sketch = current_sketch()
            memory = memory_for(layout, device) if self.sketch is not None else None
            if memory is not None:
                layout = replace(layout, pages_at=memory.address)
            self.arena = Arena(layout, dtype, rank, config.poison_freed, sinks, memory.array if memory else None)
            self.cuda = CudaHost(self.arena, device, self.sketch, memory, layer.impl.scale)
        else:
            self.arena = Arena(layout, dtype, rank, config.poison_freed, sinks)
        self._prefixes = PrefixPages(
            self.arena, self.sketch, config.split, self._names,
            lambda: self.cuda.pages if self.cuda is not None else self.arena.pages,
        )  # fmt: skip
        if layout.indexed:
            self.sampler = DecodeSampler(layout, self.arena.views, config.fidelity)
            self.arena.before_release = lambda store: self.sampler.forget(store.slot) if self.sampler else None
            path = space_path(model_identity(vllm_config), rank, config.ranks)
            self.space = ModelSpace(path, self.arena, self.sketch, config.sink_end)
        self._told = WorkerStats(self, rank)
        self.client = RingClient(
            layout, self.arena.views, config.spin_ns, config.answer_timeout_s, lambda: self.pool.alive()
        )
        kernels = self.cuda.ask_kernels if self.cuda is not None else None
        if kernels is not None:
            self.asking = Asking(layout, self.client, kernels, config.answer_timeout_s)
        self.answers = Answers(self.arena, self.client, self.asking, self._cancel_sample)
        begin = time.monotonic()
        try:
            self.pool = WorkerPool(config, layout, self.arena.views, self.arena.file.path, layer.impl.scale)
        except BaseException:
            self.arena.close()
            raise
        logger.info("retrieval: host arena of %s, ready in %.1f s", summary(config, layout), time.monotonic() - begin)

    # ---- a step

    def look_ahead(self, scheduler_output: Any) -> None:
        """Before vLLM decides how to run a step: see whether the CPU workers are needed in it, and the host at all."""
        message = getattr(scheduler_output, "kv_connector_metadata", None)
        self.needs_pieces, self.attends = False, True
        if (self.sketch is None and self.asking is None) or not isinstance(message, StepMessage):
            return
        if self.sampler is not None and message.admitted and self.sampler.draw():
            self.needs_pieces = True
            return
        if self.sketch is None:  # the graph asks the workers itself
            return
        scheduled = scheduler_output.num_scheduled_tokens
        self.needs_pieces = needs_workers(message, scheduled, self.arena, self._options_of)
        self.attends = may_attend(message, self.arena, self.config.split)

    def begin_graph(self, attn_metadata: dict[str, "RetrievalMetadata"]) -> None:
        """A graph is about to be replayed: resolve its batch, and send the descriptor that its kernels read."""
        if self.sketch is not None:
            metadata = attn_metadata[self._names[0]]
            plan = self.plan(metadata, graph=True)
            if self.paged and plan is not None and plan.sketch is not None and plan.sketch.attends:
                raise RuntimeError("retrieval: a row attends to the host in a step that was taken to need none")
            self.sketch.send(plan.sketch if plan is not None else None)
        elif self.asking is not None:
            self.asking.open(self.plan(attn_metadata[self._names[0]], graph=True))
        else:
            return
        self.graph_steps += 1
        self.paged_steps += self.paged

    def finish_forward(self) -> None:
        """All kernels of this step's layers are under way."""
        if self.sketch is not None:
            self.sketch.finish()
        if self.asking is not None:
            self.asking.sent()

    def _cancel_sample(self) -> None:
        if self.sampler is not None:
            self.sampler.cancel()

    def _look_back(self) -> None:
        """The step before may still be under way, where a graph asks the workers."""
        plan = self.answers.close_graph()
        if plan is not None:
            self._told.step(plan)
            self._count_rows(plan)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._kv_caches = {name: kv_caches[name] for name in self._names if name in kv_caches}
        if self.hosted and self.cuda is not None and self._kv_caches:
            self._warm_up(next(iter(self._kv_caches.values())))

    def begin_step(self, message: StepMessage) -> None:
        """Take the scheduler's word before the forward pass: release what ended."""
        if self.hosted:
            self._look_back()
            self._prefixes.keep(message.kept)
            for request_id, epoch in message.released:
                self._release(request_id, epoch)
            for number in message.dropped:
                self.arena.drop(number)
            for request_id, opening in message.opened.items():
                self._prefixes.open(request_id, message.admitted[request_id], opening, self._kv_caches)
            self._options.update(message.options)
            self._allow_indexing()
            if self.space is not None:
                self.space.look(message.admitted.keys() | message.resident)
        self._message = message

    def _release(self, request_id: str, epoch: int) -> None:
        self.arena.release(request_id, epoch)
        if request_id not in self.arena.requests:
            self._options.pop(request_id, None)

    def layer_number(self, name: str) -> int:
        return self._layer_numbers[name]

    def plan(self, metadata: "RetrievalMetadata", graph: bool = False) -> StepPlan | None:
        """Host work of this batch; None if it has none (dummy run, index ``none``). ``graph``: it replays a graph."""
        if self._message is None or metadata.request_ids is None:
            return None
        if not metadata.resolved:
            metadata.resolved = True
            self._check_rows(metadata)
            if self.config.poison_freed:
                self._metadata.append(metadata)
            if not self.hosted:
                return None
            metadata.plan = plan = self._plan = make_plan(
                metadata,
                self.arena,
                self._message.admitted,
                self.config.split,
                self._options_of,
                graph,
            )
            if self.sketch is not None and not graph:
                self.sketch.send(plan.sketch)
            self._growth.append((self._written, plan.growth))
            if self.space is not None:
                self.space.begin(metadata, plan)
            if self.sampler is not None:
                self.sampler.begin(plan)
            if plan.searched and not (self.pool.alive() and self.client.idle()):
                self.answers.attend_here(plan, "CPU workers are gone, or still at an earlier message")
        return metadata.plan

    def _options_of(self, request_id: str) -> SearchOptions:
        return self._options.get(request_id, self._default_options)

    def _check_rows(self, metadata: "RetrievalMetadata") -> None:
        assert self._message is not None
        assert metadata.request_ids is not None
        known = self._message.admitted.keys() | self._message.resident
        strangers = [name for name in metadata.request_ids if name not in known]
        if strangers:
            raise RuntimeError(f"retrieval: batch rows {strangers} are not in the scheduler's message")

    def report(self) -> WorkerReport | None:
        """What the scheduler is to know of this step."""
        if not self.hosted:
            return None
        answers = self.answers
        report = WorkerReport(answers.failed, self._read, degraded=answers.degraded)
        if self.sketch is not None:
            counts = self.sketch.take_counts()
            self._told.count("rows_read", sum(rows for rows, _ in counts.values()))
            self._told.count("searches", sum(searches for _, searches in counts.values()))
            if parts := self.sketch.take_parts():
                self._told.layer(parts)
            report = report.aggregate(WorkerReport(set(), counts, set(counts)))
        answers.failed, self._read, answers.degraded = set(), {}, set()
        self._told.count(key("requests_failed", "search"), len(report.failed))
        return report if report.failed or report.read or report.degraded else None

    def take_stats(self) -> Any:
        """What ``/metrics`` is to know by now, a RetrievalStats or None."""
        return self._told.take() if self.hosted else None

    def fence_mirror(self) -> None:
        """Order the mirror copies of this step before whatever may overwrite their source (CUDA)."""
        if self.hosted and self.cuda is not None:
            self.cuda.fence_mirror()

    def end_step(self) -> None:
        if self.hosted:
            self._prefixes.step_ends()
            plan, self._plan = self._plan, None
            if self.asking is None or plan is None or plan is not self.asking.under_way:  # else it is not over yet
                self._told.step(plan)
                self._count_rows(plan)
            if self.sampler is not None:
                self.sampler.end()
            self._written = self.cuda.mirrored() if self.cuda is not None else None
        if self.config.poison_freed:
            poison_left_blocks(self._metadata, self.config.split, self._kv_caches)
            self._metadata.clear()
        self._message = None

    def _count_rows(self, plan: StepPlan | None) -> None:
        self.answers.waited_s, waited = 0.0, self.answers.waited_s
        if plan is not None and plan.searches:
            self._told.count("rows_read", int(plan.rows_read.sum()))
            self._told.count("searches", plan.searches * len(plan.decode_ids))
            self._told.layer({"search": waited / self.arena.layout.layers})
            for request_id, rows in zip(plan.decode_ids, plan.rows_read.tolist(), strict=True):
                self._read[request_id] = (rows, plan.searches)

    # ---- indexes

    def _allow_indexing(self) -> None:
        """Let indexes grow over what has arrived in the arena: all that was written before a step, once the copies
        that the step before it ordered are done. (A graph writes on its own stream, and is over by now.)

        Not while CPU workers are still at a message that nobody waits for any more: they would search an index that
        is being extended."""
        if not (self.client.idle() or self.pool.gave_up):
            return
        while self._growth and (self._growth[0][0] is None or self._growth[0][0].query()):
            for store, tokens in self._growth.pop(0)[1]:
                if self.arena.requests.get(store.request_id) is store:
                    self.arena.allow_indexing(store, tokens)

    def stats(self) -> dict[str, Any]:
        """Counters for benchmarks and tests."""
        found: dict[str, Any] = {"index": self.config.index}
        if self.hosted:
            self._look_back()
            if self.space is not None:
                self.space.finish()
            found |= {
                "host_bytes": self.arena.used_bytes,
                "host_pages": self.arena.used_pages,
                "host_tokens": self.arena.host_tokens,
                "indexed_tokens": self.arena.indexed_tokens,
                "index_bytes": self.arena.indexed_tokens * self.config.index_bytes_per_token,
                "requests": len(self.arena.requests),
                "restarts": self.pool.restarts.total(),
                "gave_up": self.pool.gave_up,
                "degraded_steps": self.answers.degraded_steps,
                "actor_pids": self.pool.pids(),
                "path": self.arena.file.path,
                "space": "learned" if self.arena.space == LEARNED else "rotation",
                "graph_steps": self.graph_steps,
                "paged_steps": self.paged_steps,
                "code_pages": self.sketch.codes.used if self.sketch is not None else 0,
                "uncoded": self.arena.uncoded,
                "probes": self.sampler.probes if self.sampler is not None else 0,
                "fidelity": self.sampler.figures() if self.sampler is not None else {},
            }
        return found

    def close(self) -> None:
        global _current
        if _current is self:
            _current = None
        if self.hosted:
            begin = time.monotonic()
            if self.sketch is not None:
                from vllm_retrieval_attn.device.sketch import keep_sketch

                keep_sketch(None)
            if self.cuda is not None:
                self.cuda.close()
            self.arena.close()  # first: vLLM gives a worker few seconds to go
            self.pool.close()
            self.hosted = False
            logger.info("retrieval: host memory and workers released in %.1f s", time.monotonic() - begin)
