# SPDX-License-Identifier: Apache-2.0
"""The scheduler's account of host memory: who may hold how many arena pages.

Kept in EngineCore, in step with what the workers will really take: a request reserves its whole
prompt when it is admitted and grows page by page while it generates. Where a page is wanted and
none is free, the manager refuses the allocation and vLLM does what it does for paged blocks: a running
request preempts another. Who waits is asked about before (plugin/line.py). Pages that are kept for their prefix
(core/prefixes.py) count once, and count as free while no live request shares them.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from vllm_retrieval_attn.core.ownership import Split, cdiv
from vllm_retrieval_attn.core.prefixes import NOTHING, Match, Prefixes


@dataclass
class Held:
    """What a request holds.

    Attributes:
        pages: in order; number of a kept page, or None for one of its own. match: what it began with.
        published: blocks of it that others may match.
    """

    pages: list[int | None] = field(default_factory=list)
    match: Match = NOTHING
    published: int = 0

    @property
    def own(self) -> int:
        return self.pages.count(None)


@dataclass
class HostLedger:
    """Pages of one rank; all ranks are alike.

    Attributes:
        pages: capacity. page_tokens, split: as in ResolvedConfig. prefixes: kept pages, None where nothing is reused.
        before_release: called with a request's name while it still holds what it is about to give back.
    """

    pages: int
    page_tokens: int
    split: Split
    prefixes: Prefixes | None = None
    held: dict[str, Held] = field(default_factory=dict)
    before_release: Callable[[str], None] | None = None
    _own: int = 0
    _matches: dict[str, Match] = field(default_factory=dict)
    _resident_only: set[str] = field(default_factory=set)

    @property
    def free_pages(self) -> int:
        """Pages that may be had, those of idle prefixes among them."""
        busy = len(self.prefixes.kept) - len(self.prefixes.idle) if self.prefixes is not None else 0
        return self.pages - self._own - busy

    @property
    def longest(self) -> int:
        """Tokens of a request that holds every page."""
        return self.split.sink_end + self.pages * self.page_tokens

    def arrived(self, request_id: str, max_tokens: int) -> None:
        """Note a request of at most ``max_tokens`` tokens (prompt and output); short ones never need the host."""
        if self.pages == 0 or self.split.never_leaves_pages(max_tokens):
            self._resident_only.add(request_id)

    def needs_host(self, request_id: str) -> bool:
        return request_id not in self._resident_only

    def match(self, request_id: str, hashes: Sequence[Hashable], limit: int) -> Match:
        """What of the first ``limit`` tokens need not be computed; a request counts on it when it next takes pages."""
        self._matches.pop(request_id, None)
        if self.prefixes is None or request_id in self.held or not self.needs_host(request_id):
            return NOTHING
        match = self.prefixes.match(hashes, limit)
        if match.tokens:
            self._matches[request_id] = match
        return match

    def held_pages(self, request_id: str) -> int:
        """Pages that a request has, shared ones among them."""
        return len(self.held[request_id].pages) if request_id in self.held else 0

    def required(self, request_id: str, tokens: int) -> int:
        """Pages beyond those held that ``tokens`` tokens of a request take from ``free_pages``."""
        if not self.needs_host(request_id):
            return 0
        pages = cdiv(max(0, tokens - self.split.sink_end), self.page_tokens)
        if request_id in self.held:
            return max(0, pages - len(self.held[request_id].pages))
        match = self._matches.get(request_id, NOTHING)
        idle = self.prefixes.idle if self.prefixes is not None else ()
        return max(0, pages - len(match.pages)) + sum(number in idle for number in match.used)

    def fits(self, request_id: str, tokens: int) -> bool:
        return self.required(request_id, tokens) <= self.free_pages

    def hold(self, request_id: str, tokens: int) -> None:
        """Take the pages for ``tokens`` tokens; ``fits`` must hold."""
        more = self.required(request_id, tokens)
        if more > self.free_pages:
            raise RuntimeError(f"ledger: {request_id} takes {more} pages, {self.free_pages} are free")
        if not self.needs_host(request_id):
            return
        held = self.held.get(request_id)
        if held is None:
            match = self._matches.pop(request_id, NOTHING)
            if not more and not match.tokens:
                return
            held = self.held[request_id] = Held(list(match.pages), match)
            if self.prefixes is not None:
                self.prefixes.use(match)
                held.published = self.prefixes.first + len(match.pages) * self.prefixes.page_blocks
        new = max(0, cdiv(max(0, tokens - self.split.sink_end), self.page_tokens) - len(held.pages))
        held.pages += [None] * new
        self._own += new
        while self.prefixes is not None and self._own + len(self.prefixes.kept) > self.pages:
            self.prefixes.evict()

    def publish(self, request_id: str, hashes: Sequence[Hashable], tokens: int) -> list[tuple[int, int]]:
        """The first ``tokens`` tokens of a request are computed: others may match them. Returns (index, number) of its
        pages that are kept from now on."""
        held = self.held.get(request_id)
        if self.prefixes is None or held is None:
            return []
        held.published, kept = self.prefixes.publish(
            request_id, held.pages, held.published, hashes, tokens // self.split.block_size
        )
        self._own -= len(kept)
        return kept

    def release(self, request_id: str) -> None:
        """Give back what a request holds (finish, abort or preemption)."""
        self._matches.pop(request_id, None)
        if request_id not in self.held:
            return
        if self.before_release is not None:
            self.before_release(request_id)
        held = self.held.pop(request_id)
        self._own -= held.own
        if self.prefixes is not None:
            self.prefixes.leave([number for number in held.pages if number is not None])
            if held.match.source is not None:
                self.prefixes.leave([held.match.source])
            self.prefixes.await_no_more(request_id)

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self.release(request_id)
        self._resident_only.discard(request_id)
