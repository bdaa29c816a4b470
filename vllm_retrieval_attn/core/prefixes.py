# SPDX-License-Identifier: Apache-2.0
"""Host pages that outlive their request: named by vLLM's block hashes, shared, dropped least recently used.

A block hash names a block and all before it (vLLM's chain, which LoRA and cache salts enter), so the hash of a page's
last block names the page. A request *publishes* its pages as their blocks are computed. Another one *matches* them:
whole pages are shared, of one more page the leading blocks are copied. The sinks lie apart, in slots of their own.

Kept in EngineCore; workers follow by the numbers that pages have here.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from vllm_retrieval_attn.core.ownership import Split


@dataclass
class KeptPage:
    """Attributes:
    hashes: of its leading blocks, those that are computed. users: live requests that share it.
    """

    hashes: list[Hashable] = field(default_factory=list)
    users: int = 0


@dataclass(frozen=True)
class Match:
    """What is there of a prompt.

    Attributes:
        tokens: how many need not be computed. pages: numbers of the whole pages, in order.
        source: number of the page whose leading ``blocks`` are copied, or None. sink: slot of the sinks, -1 without.
    """

    tokens: int = 0
    pages: tuple[int, ...] = ()
    source: int | None = None
    blocks: int = 0
    sink: int = -1

    @property
    def used(self) -> tuple[int, ...]:
        """All pages that must stay as long as the match counts."""
        return self.pages if self.source is None else (*self.pages, self.source)


NOTHING = Match()


@dataclass
class Changes:
    """What happened since they were last taken.

    Attributes:
        stored: runs of blocks that can be matched now: their hashes, and where in the request they begin.
        removed: hashes of blocks that can not be matched any more. dropped: numbers of pages.
    """

    stored: list[tuple[str, int, list[Hashable]]] = field(default_factory=list)
    removed: list[Hashable] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)


class Prefixes:
    """Kept pages, and where their blocks are.

    Args:
        split: where tokens are divided. page_tokens: tokens of a page, whole blocks. sink_slots: sinks kept at once.

    Attributes:
        kept: by number. idle: those that no live request shares, least recently used first.
        evicted: pages, ever, that were dropped for want of memory.
    """

    def __init__(self, split: Split, page_tokens: int, sink_slots: int) -> None:
        self.first, self.page_blocks = split.sink_end // split.block_size, page_tokens // split.block_size
        self._block = split.block_size
        self.kept: dict[int, KeptPage] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.evicted = 0
        self.changes = Changes()
        self._where: dict[Hashable, tuple[int, int]] = {}
        self._sinks: OrderedDict[Hashable, int] = OrderedDict()
        self._slots = list(range(sink_slots - 1, -1, -1))
        self._pending: dict[Hashable, str] = {}
        self._waited: dict[str, list[Hashable]] = {}
        self._next = 0

    # ---- finding

    def match(self, hashes: Sequence[Hashable], limit: int) -> Match:
        """What is there of the first ``limit`` tokens of a prompt with these block hashes."""
        blocks, at = min(len(hashes), limit // self._block), self.first
        if blocks <= at or (at and hashes[at - 1] not in self._sinks):
            return NOTHING
        pages: list[int] = []
        while at + self.page_blocks <= blocks:
            page, index = self._where.get(hashes[at + self.page_blocks - 1], (-1, -1))
            if index != self.page_blocks - 1:
                break
            pages.append(page)
            at += self.page_blocks
        source, leading = None, 0
        for count in range(min(self.page_blocks - 1, blocks - at), 0, -1):
            page, index = self._where.get(hashes[at + count - 1], (-1, -1))
            if index == count - 1:
                source, leading = page, count
                break
        if not pages and source is None:
            return NOTHING
        sink = self._sinks[hashes[self.first - 1]] if self.first else -1
        return Match((at + leading) * self._block, tuple(pages), source, leading, sink)

    def computed_elsewhere(self, request_id: str, hashes: Sequence[Hashable], match: Match, limit: int) -> bool:
        """Whether another request is at computing the block that comes after ``match``: it is worth waiting for."""
        at = max(match.tokens // self._block, self.first)
        return at < min(len(hashes), limit // self._block) and self._pending.get(hashes[at], request_id) != request_id

    # ---- sinks

    def has_sinks(self, hashes: Sequence[Hashable]) -> bool:
        """Whether a prompt's sinks are kept, or there are none."""
        return not self.first or hashes[self.first - 1] in self._sinks

    def take_slot(self) -> int:
        """A slot for a prompt's sinks, maybe that of those not used for longest; -1: all are being written."""
        if not self._slots and not self._sinks:
            return -1
        return self._slots.pop() if self._slots else self._sinks.popitem(last=False)[1]

    def give_slot(self, slot: int) -> None:
        """Nothing will be found in a slot that was taken."""
        self._slots.append(slot)

    def name_sinks(self, hashes: Sequence[Hashable], slot: int) -> bool:
        """A slot that was taken has a prompt's sinks from now on. False: another has them, and it is given back."""
        if self.has_sinks(hashes):
            self.give_slot(slot)
            return False
        self._sinks[hashes[self.first - 1]] = slot
        return True

    # ---- a request's pages

    def use(self, match: Match) -> None:
        """A request counts on what was matched."""
        for number in match.used:
            self.kept[number].users += 1
            self.idle.pop(number, None)
        if match.sink >= 0:
            name = next(name for name, slot in self._sinks.items() if slot == match.sink)
            self._sinks.move_to_end(name)

    def leave(self, numbers: Sequence[int]) -> None:
        """A request gives up its shares of pages, in the order of tokens: the last one is dropped first."""
        for number in reversed(numbers):
            page = self.kept[number]
            page.users -= 1
            if page.users == 0:
                self.idle[number] = None
                if not page.hashes:  # forgotten meanwhile
                    self._drop(number)

    def await_blocks(self, request_id: str, hashes: Sequence[Hashable], computed: int) -> None:
        """A request is about to compute these blocks, but for its first ``computed`` tokens."""
        mine = [name for name in hashes[max(computed // self._block, self.first) :] if name not in self._where]
        for name in mine:
            self._pending.setdefault(name, request_id)
        self._waited[request_id] = mine

    def await_no_more(self, request_id: str) -> None:
        """The request computes nothing any more."""
        for name in self._waited.pop(request_id, ()):
            if self._pending.get(name) == request_id:
                del self._pending[name]

    def publish(
        self, request_id: str, pages: list[int | None], done: int, hashes: Sequence[Hashable], last: int
    ) -> tuple[int, list[tuple[int, int]]]:
        """Blocks up to ``last`` of a request are computed, of which those up to ``done`` were published before.

        Args:
            pages: of the request, in order; None for one that is its own, which becomes a number where it has a block
                that is not known yet.

        Returns:
            Blocks published by now, and (index in ``pages``, number) of pages that are kept from now on.
        """
        kept = []
        done, last = max(done, self.first), min(last, len(hashes))
        while done < last:
            index = (done - self.first) // self.page_blocks
            if index >= len(pages):
                break
            start = self.first + index * self.page_blocks
            stop = min(last, start + self.page_blocks)
            number = pages[index]
            if number is None:
                if all(name in self._where for name in hashes[start:stop]):
                    done = stop
                    continue
                number, self._next = self._next, self._next + 1
                self.kept[number] = KeptPage(users=1)
                pages[index] = number
                kept.append((index, number))
            page = self.kept[number]
            fresh = []
            for block in range(start + len(page.hashes), stop):
                name = hashes[block]
                page.hashes.append(name)
                if name not in self._where:
                    self._where[name] = number, block - start
                    fresh.append(name)
                if self._pending.get(name) == request_id:
                    del self._pending[name]
            if fresh:
                self.changes.stored.append((request_id, stop - len(fresh), fresh))
            done = stop
        return done, kept

    # ---- memory

    def evict(self) -> None:
        """Drop the page that was not used for longest."""
        self.evicted += 1
        self._drop(next(iter(self.idle)))

    def _drop(self, number: int) -> None:
        self.idle.pop(number, None)
        self._forget(number)
        del self.kept[number]
        self.changes.dropped.append(number)

    def _forget(self, number: int) -> None:
        page = self.kept[number]
        for index, name in enumerate(page.hashes):
            if self._where.get(name) == (number, index):
                del self._where[name]
                self.changes.removed.append(name)
        page.hashes.clear()

    def reset(self) -> None:
        """Forget everything; what live requests share stays theirs, and is matched no more."""
        for number in list(self.idle):
            self._drop(number)
        for number in self.kept:
            self._forget(number)
        self._slots.extend(self._sinks.values())
        self._sinks.clear()

    def take_changes(self) -> Changes:
        """What happened since the last call."""
        changes, self.changes = self.changes, Changes()
        return changes
