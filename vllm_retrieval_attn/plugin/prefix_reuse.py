# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half of reuse: which prompts begin with what is kept on the host, and what is kept of them.

The pages of a prompt are published when the step that computes them is scheduled, since later steps run after it. So
others may count on them from the next step on; until then they wait for what another request is at computing. What is
generated is published when its request ends or is preempted.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.request import RequestStatus

from vllm_retrieval_attn.core.prefixes import NOTHING, Match
from vllm_retrieval_attn.plugin.messages import Opening, StepMessage
from vllm_retrieval_attn.plugin.metric_names import key

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from vllm_retrieval_attn.core.config import ResolvedConfig
    from vllm_retrieval_attn.core.ledger import HostLedger

MEDIUM = "CPU"
"""What KV events say that blocks lie on."""


class PrefixReuse:
    """Follows requests from arrival to end.

    Args:
        ledger: who holds which pages. config: knobs. max_model_len: vLLM's. events: whether anybody wants KV events.
    """

    def __init__(self, ledger: "HostLedger", config: "ResolvedConfig", max_model_len: int, events: bool) -> None:
        self._ledger, self._config, self._max_len = ledger, config, max_model_len
        self._split, self._wants_events = config.split, events
        self._requests: dict[str, Request] = {}
        self._epochs: dict[str, int] = {}
        self._openings: dict[str, Opening] = {}
        self._prompts: dict[str, int] = {}
        self._publishes: set[str] = set()
        self._sinking: dict[str, int] = {}
        self._kept: list[tuple[str, int, int, int]] = []
        self._events: list[KVCacheEvent] = []
        self._evicted = 0
        self._more: dict[str, float] = {}
        ledger.before_release = self._publish_all

    def arrived(self, request: "Request") -> None:
        self._requests[request.request_id] = request

    def match(self, request: "Request") -> Match:
        """What is kept of the prompt of a request that holds nothing."""
        usable = request.num_computed_tokens == 0 and not request.skip_reading_prefix_cache
        hashes = request.block_hashes if usable else ()
        return self._ledger.match(request.request_id, hashes, request.num_tokens - 1)

    def tokens(self, request: "Request") -> int | None:
        """Tokens of a prompt that need not be computed; None: ask again, since another request is at computing more."""
        match, prefixes = self.match(request), self._ledger.prefixes
        if prefixes is None or request.skip_reading_prefix_cache or not self._ledger.needs_host(request.request_id):
            return 0
        limit = request.num_tokens - 1
        if prefixes.computed_elsewhere(request.request_id, request.block_hashes, match, limit):
            return None
        return match.tokens

    def admitted(self, request: "Request", epoch: int, blocks: list[int], anew: bool) -> None:
        """A request is scheduled from the waiting queue. blocks: its paged blocks. anew: it holds nothing yet."""
        name, prefixes = request.request_id, self._ledger.prefixes
        self._prompts[name] = request.num_tokens
        if not self._ledger.needs_host(name):
            return
        held = self._ledger.held.get(name)
        match = held.match if anew and held is not None else NOTHING
        if anew:
            self._epochs[name] = epoch
            self._stop_publishing(name)
            slot = -1
            if match.tokens:
                self._publishes.add(name)
                self._count("prefix_hits", 1)
                self._count("prefix_hit_tokens", match.tokens)
            elif prefixes is not None and len(request.block_hashes) >= prefixes.first:
                if prefixes.has_sinks(request.block_hashes):
                    self._publishes.add(name)
                elif (slot := prefixes.take_slot()) >= 0:
                    self._sinking[name] = slot
            longest = self._max_len if request.resumable else request.num_prompt_tokens + request.max_tokens
            self._openings[name] = self._opening(match, longest, slot, blocks)
        if prefixes is not None and (name in self._publishes or name in self._sinking):
            prefixes.await_blocks(name, request.block_hashes, match.tokens or request.num_computed_tokens)

    def _opening(self, match: Match, longest: int, slot: int, blocks: list[int]) -> Opening:
        if not match.tokens:
            return Opening(longest, sink=slot)
        split, size = self._split, self._split.block_size
        window = blocks[split.window_start(match.tokens) // size : match.tokens // size]
        return Opening(longest, match=match, blocks=(tuple(blocks[: split.sink_end // size]), tuple(window)))

    def scheduled(self, output: "SchedulerOutput", message: StepMessage) -> None:
        """A step is scheduled: tell the workers how admissions begin, and what is kept from now on."""
        prefixes = self._ledger.prefixes
        for name, tokens in output.num_scheduled_tokens.items():
            request = self._requests.get(name)
            if prefixes is None or request is None or not self._ledger.needs_host(name):
                continue
            computed = request.num_computed_tokens
            if name in self._sinking:
                self._sink(request, computed, tokens)
            if name in self._publishes:
                self._publish(request, min(computed + tokens, self._prompts[name]))
        message.opened = {name: self._openings.pop(name) for name in list(self._openings) if name in message.admitted}
        message.kept, self._kept = self._kept, []
        if prefixes is not None:
            changes = prefixes.take_changes()
            message.dropped = changes.dropped
            self._count("prefix_evicted_pages", prefixes.evicted - self._evicted)
            self._evicted = prefixes.evicted
            for name, first, hashes in changes.stored:
                if name in self._requests:
                    self._store(self._requests[name], first, hashes)
            if changes.removed and self._wants_events:
                gone: list[Any] = changes.removed
                self._events.append(BlockRemoved([maybe_convert_block_hash(one) for one in gone], MEDIUM, group_idx=0))

    def _sink(self, request: "Request", computed: int, tokens: int) -> None:
        """Tokens of a prompt are scheduled, and its sinks are not kept yet."""
        name, prefixes = request.request_id, self._ledger.prefixes
        assert prefixes is not None
        if tokens == 1 and computed < self._split.sink_end:
            self._stop_publishing(name)  # one token may be a graph, which writes no sinks
        elif computed + tokens >= self._split.sink_end:
            self._publishes.add(name)
            if prefixes.name_sinks(request.block_hashes, self._sinking.pop(name)):
                self._store(request, 0, request.block_hashes[: prefixes.first])

    def _stop_publishing(self, name: str) -> None:
        self._publishes.discard(name)
        if self._ledger.prefixes is not None:
            if name in self._sinking:
                self._ledger.prefixes.give_slot(self._sinking.pop(name))
            self._ledger.prefixes.await_no_more(name)

    @property
    def _block(self) -> int:
        return self._split.block_size

    def _publish(self, request: "Request", tokens: int) -> None:
        name = request.request_id
        for index, number in self._ledger.publish(name, request.block_hashes, tokens):
            self._kept.append((name, self._epochs[name], index, number))

    def _publish_all(self, name: str) -> None:
        """A request is about to give back what it holds: what it generated is kept, unless it failed."""
        request = self._requests.get(name)
        if request is not None and name in self._publishes and request.status != RequestStatus.FINISHED_ERROR:
            self._publish(request, request.num_computed_tokens)
        if name in self._sinking:
            self._stop_publishing(name)

    def left(self, name: str) -> None:
        """The request is over."""
        for part in (self._requests, self._epochs, self._openings, self._prompts):
            part.pop(name, None)
        self._stop_publishing(name)

    def reset(self) -> None:
        """Forget all that is kept."""
        if self._ledger.prefixes is not None:
            self._ledger.prefixes.reset()

    # ---- telling

    def _store(self, request: "Request", first: int, hashes: Iterable[Any]) -> None:
        if not self._wants_events:
            return
        names = [maybe_convert_block_hash(one) for one in hashes]
        parent = maybe_convert_block_hash(request.block_hashes[first - 1]) if first else None
        lora = request.lora_request
        self._events.append(
            BlockStored(
                block_hashes=names, parent_block_hash=parent, block_size=self._block, medium=MEDIUM,
                token_ids=list(request.all_token_ids[first * self._block : (first + len(names)) * self._block]),
                lora_id=lora.adapter_id if lora else None, lora_name=lora.name if lora else None, group_idx=0,
            )
        )  # fmt: skip

    def take_events(self) -> list[KVCacheEvent]:
        events, self._events = self._events, []
        return events

    def _count(self, name: str, value: float) -> None:
        if value:
            self._more[name] = self._more.get(name, 0) + value

    def take_stats(self) -> tuple[dict[str, float], dict[str, float]]:
        """Gauges, and what counters grew by, if any did."""
        more, self._more = self._more, {}
        prefixes = self._ledger.prefixes
        if prefixes is None or not more:
            return {}, more
        size = self._config.page_tokens * self._config.bytes_per_token * self._config.ranks
        idle, kept = len(prefixes.idle), len(prefixes.kept)
        return {
            key("prefix_pages", "shared"): kept - idle, key("prefix_pages", "idle"): idle, "prefix_bytes": kept * size,
        }, more  # fmt: skip
