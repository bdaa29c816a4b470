"""The worker half: owns the arena, the ring and the actors of a rank, and the state of a step."""

import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_retrieval_attn.attention.cuda_builder import DeviceBuilder
from vllm_retrieval_attn.attention.fidelity import DecodeSampler
from vllm_retrieval_attn.attention.plan import StepPlan, make_plan
from vllm_retrieval_attn.attention.statistics import QueryStatistics
from vllm_retrieval_attn.compat import patch_runner
from vllm_retrieval_attn.config import COMPARED
from vllm_retrieval_attn.index.kernels import DTYPE_CODES
from vllm_retrieval_attn.index.segment import slab_bytes
from vllm_retrieval_attn.kvcache.messages import StepMessage
from vllm_retrieval_attn.kvcache.spec import RetrievalSpec
from vllm_retrieval_attn.options import SearchOptions, search_options
from vllm_retrieval_attn.store.arena import Arena
from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.timings import Timings
from vllm_retrieval_attn.workers.client import RingClient, WorkersUnavailable
from vllm_retrieval_attn.workers.pool import ActorPool
from vllm_retrieval_attn.workers.sync import check_platform

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_retrieval_attn.attention.metadata import RetrievalMetadata
    from vllm_retrieval_attn.config import ResolvedConfig
    from vllm_retrieval_attn.store.segments import RequestStore, Segment

LIBRARY_SAMPLES = 256
"""Sampled queries of each query head that the kinds to compare with are built from."""

logger = logging.getLogger("vllm.retrieval")

_current: "RetrievalWorker | None" = None


def current_worker() -> "RetrievalWorker | None":
    """The worker half of this process; None before the KV cache exists (profiling run)."""
    return _current


def retrieval_layers(kv_cache_config: "KVCacheConfig") -> dict[str, RetrievalSpec]:
    """Names and specs of the layers that use our backend, in the model's order."""
    layers: dict[str, RetrievalSpec] = {}
    for group in kv_cache_config.kv_cache_groups:
        if isinstance(group.kv_cache_spec, RetrievalSpec):
            layers.update((name, group.kv_cache_spec) for name in group.layer_names)
    return layers


def with_block_size(config: "ResolvedConfig", kv_cache_config: "KVCacheConfig") -> "ResolvedConfig":
    """The knobs with the block size that vLLM settled on for our layers (it may grow in hybrid models)."""
    specs = list(retrieval_layers(kv_cache_config).values())
    if not specs:
        raise ValueError("retrieval: this model has no full-attention layer; serve it without this backend")
    return config.model_copy(update={"block_size": specs[0].block_size})


class RetrievalWorker:
    """Host side of one tensor-parallel rank.

    Attributes:
        hosted: False with index ``none``, which has none of the following.
        arena, client, pool: the host side. cuda: its GPU half, None on CPU.
        indexed: whether sealed segments get an index; statistics: of their requests' queries; sampler: of what is
            found for them.
        timings: where decode time goes.
    """

    def __init__(self, vllm_config: "VllmConfig", config: "ResolvedConfig", kv_cache_config: "KVCacheConfig") -> None:
        global _current
        check_platform()
        patch_runner(vllm_config.use_v2_model_runner)
        self._layers = retrieval_layers(kv_cache_config)
        self.config = with_block_size(config, kv_cache_config)
        self._layer_numbers = {name: i for i, name in enumerate(self._layers)}
        self._names: list[str] = list(self._layers)
        self.timings = Timings()
        self._message: StepMessage | None = None
        self._failed: set[str] = set()
        self._metadata: list[RetrievalMetadata] = []
        self._kv_caches: dict[str, torch.Tensor] = {}
        self.hosted = config.index != "none"
        self.indexed = config.index_slabs > 0
        self._sealing: list[tuple[RequestStore, Segment]] = []
        if self.hosted:
            self._start_host(vllm_config)
        _current = self

    def _start_host(self, vllm_config: "VllmConfig") -> None:
        config = self.config
        specs = set(self._layers.values())
        if len(specs) != 1:
            raise ValueError("retrieval: full-attention layers of different shapes are not supported")
        (spec,) = specs
        layer = vllm_config.compilation_config.static_forward_context[self._names[0]]
        itemsize = torch.empty((), dtype=spec.dtype).element_size()
        per_token = len(self._layers) * spec.num_kv_heads * 2 * spec.head_size * itemsize
        if per_token != config.bytes_per_token:
            raise ValueError(
                f"retrieval: the model keeps {per_token} bytes a token in {len(self._layers)} layers, "
                f"{config.bytes_per_token} were expected from its config; this model's layout is not supported"
            )
        max_len = vllm_config.model_config.max_model_len
        page_tokens = config.page_tokens
        layout = Layout(
            layers=len(self._layers),
            heads=layer.num_heads,
            kv_heads=spec.num_kv_heads,
            dim=spec.head_size,
            itemsize=itemsize,
            dtype_code=DTYPE_CODES[str(spec.dtype).removeprefix("torch.")],
            page_tokens=page_tokens,
            pages=config.host_pages,
            max_rows=vllm_config.scheduler_config.max_num_seqs,
            table_pages=min(config.host_pages, -(-max_len // page_tokens)) + 1,
            actors=config.workers,
            threads=config.threads,
            segment_tokens=config.segment_tokens,
            slabs=config.index_slabs,
            slab_bytes=slab_bytes(config.index, config.segment_tokens, spec.head_size) if config.index_slabs else 0,
            samples=LIBRARY_SAMPLES if config.index in COMPARED else Layout.samples,
        )
        self._default_options = search_options(config, None)
        self._options: dict[str, SearchOptions] = {}
        self._sealed: list[tuple[Any, list[tuple[RequestStore, Segment]]]] = []
        rank = vllm_config.parallel_config.rank
        self.arena = Arena(layout, spec.dtype, rank, config.segment_tokens, config.poison_freed)
        self.cuda: Any = None
        if vllm_config.device_config.device_type == "cuda":
            from vllm_retrieval_attn.attention.cuda import CudaHost

            self.cuda = CudaHost(self.arena, torch.device("cuda", torch.cuda.current_device()))
        if self.indexed:
            device = self.cuda.device if self.cuda is not None else torch.device("cpu")
            self.statistics = QueryStatistics(layout, self.arena.views, device)
            for slot in range(layout.max_rows):
                self.statistics.forget(slot)
            if self.cuda is not None and config.index == "attention" and config.build_on == "gpu":
                self.arena.index.device_builder = DeviceBuilder(
                    layout, self.arena.views, self.arena.pages, device, layer.impl.scale, config.budget or 0.0
                )
            self.sampler = DecodeSampler(layout, self.arena.views, config.fidelity, self._refresh)
            self.arena.before_release = self._forget
        self.client = RingClient(layout, self.arena.views, config.spin_ns, lambda since: self.pool.revive(since))
        begin = time.monotonic()
        try:
            self.pool = ActorPool(config, layout, self.arena.views, self.arena.file.path, layer.impl.scale)
        except BaseException:
            self.arena.close()
            raise
        logger.info(
            "retrieval: host arena of %.1f GB (%d tokens, %.1f KB each), %d workers x %d threads, ready in %.1f s",
            layout.pages * layout.page_bytes / 1e9,
            config.host_tokens,
            per_token / 1e3,
            layout.actors,
            layout.threads,
            time.monotonic() - begin,
        )

    # ---- a step

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._kv_caches = {name: kv_caches[name] for name in self._names if name in kv_caches}
        if self.hosted and self.arena.index.device_builder is not None:
            self.arena.index.device_builder.warm_up()

    def begin_step(self, message: StepMessage) -> None:
        """Take the scheduler's word before the forward pass: release what ended."""
        if self.hosted:
            for request_id, epoch in message.released:
                self._release(request_id, epoch)
            self._options.update(message.options)
            if self.indexed:
                self._queue_builds()
        self._message = message

    def _release(self, request_id: str, epoch: int) -> None:
        self.arena.release(request_id, epoch)
        if request_id not in self.arena.requests:
            self._options.pop(request_id, None)

    def _forget(self, store: "RequestStore") -> None:
        self.statistics.forget(store.slot)
        self.sampler.forget(store.slot)

    def layer_number(self, name: str) -> int:
        return self._layer_numbers[name]

    def plan(self, metadata: "RetrievalMetadata") -> StepPlan | None:
        """Host work of this batch; None if it has none (dummy run, index ``none``)."""
        if self._message is None or metadata.request_ids is None:
            return None
        if not metadata.resolved:
            metadata.resolved = True
            self._check_rows(metadata)
            if self.config.poison_freed:
                self._metadata.append(metadata)
            if not self.hosted:
                return None
            metadata.plan = make_plan(
                metadata,
                self.arena,
                self._message.admitted,
                self.config.sink_end,
                lambda request_id: self._options.get(request_id, self._default_options),
            )
            if self.indexed:
                self._sealing += metadata.plan.sealed
                self.sampler.begin(metadata.plan)
            if len(metadata.plan.decode_ids) and not self.pool.available():
                self.fail(metadata.plan, WorkersUnavailable("CPU workers are not back yet"))
        return metadata.plan

    def _check_rows(self, metadata: "RetrievalMetadata") -> None:
        assert self._message is not None
        assert metadata.request_ids is not None
        known = self._message.admitted.keys() | self._message.resident
        strangers = [name for name in metadata.request_ids if name not in known]
        if strangers:
            raise RuntimeError(f"retrieval: batch rows {strangers} are not in the scheduler's message")

    def fail(self, plan: StepPlan, error: Exception) -> None:
        """The search of this step can not be done: its requests end with an error, others go on."""
        logger.error("retrieval: %d request(s) fail: %s", len(plan.decode_ids), error)
        self.client.abandon()
        plan.failed = True
        self._failed.update(plan.decode_ids)

    def take_failed(self) -> set[str]:
        failed, self._failed = self._failed, set()
        return failed

    def fence_mirror(self) -> None:
        """Order the mirror copies of this step before whatever may overwrite their source (CUDA)."""
        if self.hosted and self.cuda is not None:
            self.cuda.fence_mirror()

    def end_step(self) -> None:
        if self.hosted and self.indexed:
            self.sampler.end()
        if self._sealing:
            self._sealed.append((self.cuda.mirrored() if self.cuda is not None else None, self._sealing))
            self._sealing = []
        if self.config.poison_freed:
            self._poison_left_blocks()
        self._message = None

    def _poison_left_blocks(self) -> None:
        """Overwrite the paged blocks that this step's rows will never attend to again."""
        for metadata in self._metadata:
            block = self.config.block_size
            sink_blocks = self.config.sink_end // block
            after = metadata.computed + metadata.query_lens
            left = np.maximum(self.config.sink_end, (after - self.config.window_tokens) // block * block)
            for row in range(len(after)):
                columns = sink_blocks + np.arange((left[row] - metadata.windows[row]) // block)
                blocks = metadata.resident_table[row][torch.from_numpy(columns)].long()
                for cache in self._kv_caches.values():
                    cache[blocks] = float("nan")
        self._metadata.clear()

    # ---- indexes

    def _refresh(self, slot: int) -> None:
        for store in self.arena.requests.values():
            if store.slot == slot:
                self.arena.index.refresh(store)

    def wait_for_index(self, timeout_s: float) -> None:
        """Wait, between steps, until no build is queued: for measurements of the index alone.

        Raises:
            TimeoutError: builds did not finish.
        """
        deadline = time.monotonic() + timeout_s
        while self.indexed and (self._sealed or self.arena.index.pending):
            self._queue_builds()
            if time.monotonic() > deadline:
                raise TimeoutError(f"retrieval: {self.arena.index.pending} segments are not indexed yet")
            time.sleep(0.002)

    def _queue_builds(self) -> None:
        """Queue the indexes of segments whose rows have arrived in the arena."""
        while self._sealed and (self._sealed[0][0] is None or self._sealed[0][0].query()):
            _, sealed = self._sealed.pop(0)
            for slot in {store.slot for store, segment in sealed if segment.number == 0}:
                self.statistics.publish(slot)
            for store, segment in sealed:
                if self.arena.requests.get(store.request_id) is store:
                    self.arena.index.add(store, segment)
        before = self.arena.index.built
        self.arena.index.poll()
        if self.arena.index.built > before:
            left = self.arena.index.seconds_left()
            logger.debug(
                "retrieval: %d segments indexed, %d waiting%s",
                self.arena.index.built,
                self.arena.index.pending,
                "" if left is None else f", about {left:.1f} s left",
            )

    def stats(self) -> dict[str, Any]:
        """Counters for benchmarks and tests; ``timings`` start again from zero."""
        found: dict[str, Any] = {"timings": self.timings.take(), "index": self.config.index}
        if self.hosted:
            found |= {
                "host_bytes": self.arena.used_bytes,
                "host_pages": self.arena.used_pages,
                "host_tokens": self.arena.host_tokens,
                "requests": len(self.arena.requests),
                "restarts": self.pool.restarts,
                "actor_pids": self.pool.pids(),
                "path": self.arena.file.path,
                **self.stats_of_index(),
            }
        return found

    def stats_of_index(self) -> dict[str, Any]:
        """Segments ever indexed, segments that wait, bytes of the indexes held, segments looked at for drift, and how
        close to exact search sampled decode steps came (attention/fidelity.py)."""
        index = self.arena.index
        return {
            "segments_indexed": index.built,
            "segments_waiting": index.pending,
            "index_bytes": index.used_slabs * self.arena.layout.segment_slab_bytes,
            "segments_refreshed": index.refreshes,
            "probes": self.sampler.probes if self.indexed else 0,
            "fidelity": self.sampler.figures() if self.indexed else {},
        }

    def close(self) -> None:
        global _current
        if _current is self:
            _current = None
        if self.hosted:
            begin = time.monotonic()
            if self.arena.index.device_builder is not None:
                self.arena.index.device_builder.stop()
            if self.cuda is not None:
                self.cuda.close()
            self.arena.close()  # first: vLLM gives a worker few seconds to go
            self.pool.close()
            self.hosted = False
            logger.info("retrieval: host memory and workers released in %.1f s", time.monotonic() - begin)
