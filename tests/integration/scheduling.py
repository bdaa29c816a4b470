# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with our manager and connector, and an arena of token ids in place of a model."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.plugin.messages import WorkerReport
from vllm_retrieval_attn.plugin.resolved import resolved_config
from vllm_retrieval_attn.plugin.spec import RetrievalSpec

SINK, WINDOW, BLOCK, PAGE, CHUNK = 16, 32, 16, 64, 48
BYTES_PER_TOKEN = 46_080
TOKEN, STOP = 7, 2  # what the model says
READ = 9  # rows that a step reads


def make_config(pages: int, reuse: bool = False) -> Any:
    args = EngineArgs(
        model=str(smollm2()),
        attention_backend="retrieval",
        additional_config={
            "retrieval": {
                "sink_tokens": SINK,
                "window_tokens": WINDOW,
                "resident_tokens": 0,
                "page_tokens": PAGE,
                "index": "flat",
                "host_memory_gb": (pages + 0.5) * PAGE * BYTES_PER_TOKEN / 1e9,
            }
        },
        dtype="float32",
        max_model_len=4096,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        block_size=BLOCK,
        enable_prefix_caching=reuse,
        kv_cache_memory_bytes=10**9,
    )
    return args.create_engine_config()


@dataclass
class Store:
    """What the worker holds of an admission: the token whose K and V lie at each position from the first on."""

    epoch: int
    written: list[int] = field(default_factory=list)
    pages: dict[int, tuple[int, int]] = field(default_factory=dict)  # those of others


class Simulation:
    """Steps of a scheduler. The worker's side is checked as it goes: no position is read that was not written by the
    admission that reads it, and the arena never gives out more than it has.

    Attributes:
        tokens, finish: output of each request so far, and its last finish reason.
    """

    def __init__(self, config: Any, asynchronous: bool = False, blocks: int = 200) -> None:
        self.config = config
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.async_scheduling = asynchronous
        import torch

        spec = RetrievalSpec(
            block_size=BLOCK,
            num_kv_heads=3,
            head_size=64,
            dtype=torch.float32,
            sink_tokens=SINK,
            window_tokens=WINDOW,
            resident_tokens=0,
            in_flight_tokens=config.max_in_flight_tokens,
        )
        cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        kind = AsyncScheduler if asynchronous else Scheduler
        self.scheduler: Any = kind(config, cache, StructuredOutputManager(config), BLOCK)
        self.connector: Any = self.scheduler.connector
        self.ledger = self.connector._ledger
        self.pages = resolved_config(config).host_pages
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256) if config.cache_config.enable_prefix_caching else None
        self.stores: dict[str, Store] = {}
        self.kept: dict[int, tuple[Store, int]] = {}
        self.sinks: dict[int, Store] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.stopping: set[str] = set()
        self._depth = 2 if asynchronous else 1
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def add(
        self, name: str, prompt: int, new: int, session: bool = False, own: int = 0, branch: int = 0, **more: Any
    ) -> None:
        """A request, or a session's next chunk, of ``prompt`` tokens, the last ``own`` of which are of ``branch``."""
        self.tokens.setdefault(name, [])
        before = self.scheduler.requests.get(name)
        start = 100 + (before.num_tokens if before is not None else 0)  # a token says where it lies
        params = SamplingParams(temperature=0, max_tokens=new, stop_token_ids=[STOP])
        ids = list(range(start, start + prompt))
        ids[prompt - own :] = [10_000 * branch + token for token in ids[prompt - own :]]
        self.scheduler.add_request(
            Request(name, ids, params, None, resumable=session, block_hasher=self._hasher, **more)
        )

    def add_ids(self, name: str, ids: list[int], new: int) -> None:
        """A request with these tokens."""
        self.tokens.setdefault(name, [])
        params = SamplingParams(temperature=0, max_tokens=new, stop_token_ids=[STOP])
        self.scheduler.add_request(Request(name, ids, params, None, block_hasher=self._hasher))

    def end(self, name: str) -> None:
        """The client closes its session."""
        params = SamplingParams(max_tokens=1)
        self.scheduler.add_request(Request(name, [0], params, None))

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def preempt(self) -> None:
        """What the scheduler does where a running request gets no blocks."""
        scheduler = self.scheduler
        drop = scheduler.requires_kv_delivery
        scheduler._preempt_request(scheduler.running.pop(), time.monotonic(), drop_stale_output=drop)

    def step(self) -> int:
        """Schedule a step and take in the oldest that is under way; returns the tokens scheduled."""
        scheduled = 0
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            assert output.has_sync_kv_loads  # so that a graph's kernels find their step's descriptor
            scheduled = output.total_num_scheduled_tokens
            self._in_flight.append((output, self._execute(output)))
        if self._in_flight and (len(self._in_flight) >= self._depth or not scheduled):
            self._take_in()
        return scheduled

    def drain(self) -> None:
        """Take in all that is under way, as a pause does."""
        while self._in_flight:
            self._take_in()

    def _take_in(self) -> None:
        for found in self.scheduler.update_from_output(*self._in_flight.popleft()).values():
            for one in found.outputs:
                self.tokens[one.request_id] += one.new_token_ids
                if one.finish_reason is not None:
                    self.finish[one.request_id] = str(one.finish_reason)

    def run(self, limit: int = 2000) -> int:
        """Step until nothing can be scheduled; returns the steps taken. Requests that wait for a client may be left."""
        idle = 0
        for number in range(limit):
            idle = 0 if self.step() else idle + 1
            if idle > 2 * self._depth:
                return number
        raise AssertionError(f"no end after {limit} steps")

    def held(self) -> dict[str, int]:
        """Pages of each request."""
        return {name: len(held.pages) for name, held in self.ledger.held.items()}

    def nothing_left(self) -> bool:
        manager = self.scheduler.kv_cache_manager
        free = manager.block_pool.get_num_free_blocks() == manager.block_pool.num_gpu_blocks - 1
        connector = self.connector
        log = connector.log
        told = (connector._epochs, log._live, log._options, log._cached, log._read)
        return free and not (self.stores or self.ledger.held or any(told) or self.scheduler.requests)

    def _execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        message = output.kv_connector_metadata
        later = [one for one in message.kept if not self._keep(*one)]
        for name, epoch in message.released:
            if name in self.stores and self.stores[name].epoch <= epoch:
                del self.stores[name]
        for number in message.dropped:
            del self.kept[number]
        for name, opening in message.opened.items():
            self._open(name, message.admitted[name], opening)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, new in output.num_scheduled_tokens.items():
            if name in message.admitted:
                self._write(name, message.admitted[name], computed[name], new)
        for one in later:
            assert self._keep(*one), one
        pages = {(id(store), index) for store, index in self.kept.values()}
        for store in self.stores.values():
            pages |= {store.pages.get(i, (id(store), i)) for i in range(-(-max(0, len(store.written) - SINK) // PAGE))}
        assert len(pages) <= self.pages
        return self._sample(output, computed)

    def _keep(self, name: str, epoch: int, index: int, number: int) -> bool:
        store = self.stores.get(name)
        if store is None or store.epoch != epoch or SINK + index * PAGE >= len(store.written):
            return False
        assert number not in self.kept
        self.kept[number] = store, index
        return True

    def _content(self, number: int) -> list[int]:
        store, index = self.kept[number]
        return store.written[SINK + index * PAGE : SINK + (index + 1) * PAGE]

    def _open(self, name: str, epoch: int, opening: Any) -> None:
        store = self.stores.get(name)
        if store is None or store.epoch != epoch:
            store = self.stores[name] = Store(epoch)
        if opening.sink >= 0:
            self.sinks[opening.sink] = store
        match = opening.match
        if not match.tokens:
            return
        store.written += self.sinks[match.sink].written[:SINK]
        for index, number in enumerate(match.pages):
            store.written += self._content(number)
            store.pages[index] = id(self.kept[number][0]), self.kept[number][1]
        if match.source is not None:
            store.written += self._content(match.source)[: match.blocks * BLOCK]
        assert len(store.written) == match.tokens
        split = self.connector._config.split
        assert len(opening.blocks[0]) == SINK // BLOCK
        assert len(opening.blocks[1]) == (match.tokens - split.window_start(match.tokens)) // BLOCK
        assert 0 not in opening.blocks[0] + opening.blocks[1]

    def _write(self, name: str, epoch: int, computed: int, new: int) -> None:
        request = self.scheduler.requests[name]
        store = self.stores.get(name)
        if store is None or store.epoch != epoch:
            store = self.stores[name] = Store(epoch)
        assert len(store.written) >= computed, f"{name}: {computed} computed, {len(store.written)} on the host"
        ids = request.all_token_ids
        assert store.written[:computed] == ids[:computed], f"{name}: other tokens on the host"
        # With steps in flight the last tokens are not known yet: they are the model's.
        store.written[computed:] = [*ids[computed : computed + new], *[TOKEN] * (computed + new - len(ids))]

    def _sample(self, output: SchedulerOutput, computed: dict[str, int]) -> ModelRunnerOutput:
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self.scheduler.requests[name]
            done = computed[name] + output.num_scheduled_tokens[name] >= request.num_tokens
            stops = done and name in self.stopping
            self.stopping -= {name} if stops else set()
            sampled.append([STOP if stops else TOKEN] if done else [])
        report = WorkerReport(read=dict.fromkeys(output.kv_connector_metadata.admitted, (READ, 1)))
        told = KVConnectorOutput(kv_connector_worker_meta=report)
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled, kv_connector_output=told)
