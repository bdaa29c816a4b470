"""A request's host tokens as pages (unit of memory) and segments (unit of indexing)."""

from dataclasses import dataclass, field
from enum import Enum


class SegmentState(Enum):
    """OPEN: rows arrive. SEALED: full, immutable, scanned exactly. INDEXED: an index covers it."""

    OPEN = "open"
    SEALED = "sealed"
    INDEXED = "indexed"


_NEXT = {
    (SegmentState.OPEN, SegmentState.SEALED),
    (SegmentState.SEALED, SegmentState.INDEXED),
}


@dataclass
class Segment:
    """``segment_tokens`` consecutive host tokens of one request."""

    number: int
    state: SegmentState = SegmentState.OPEN

    def move(self, to: SegmentState) -> None:
        """Change state; a step that the life cycle does not have is an error."""
        if (self.state, to) not in _NEXT:
            raise ValueError(f"segment {self.number}: {self.state.value} -> {to.value} is not a step of its life")
        self.state = to


@dataclass
class RequestStore:
    """What one admitted request holds on the host.

    Attributes:
        request_id, epoch: the admission that this belongs to.
        slot: its page table in the shared file.
        pages: page numbers, in token order.
        tokens: host tokens written so far, counted from the end of the sink region.
        segments: the last one may be open.
        slabs: segment number -> slab of its index, built or not.
    """

    request_id: str
    epoch: int
    slot: int
    segment_tokens: int
    pages: list[int] = field(default_factory=list)
    tokens: int = 0
    segments: list[Segment] = field(default_factory=list)
    slabs: dict[int, int] = field(default_factory=dict)

    def written(self, tokens: int) -> list[Segment]:
        """Record that host tokens ``[0, tokens)`` are written; returns the segments this sealed."""
        if tokens < self.tokens:
            raise ValueError(f"{self.request_id}: host tokens went from {self.tokens} back to {tokens}")
        self.tokens = tokens
        while len(self.segments) * self.segment_tokens < tokens:
            self.segments.append(Segment(len(self.segments)))
        sealed = []
        for segment in self.segments[-(tokens // self.segment_tokens + 2) :]:
            full = (segment.number + 1) * self.segment_tokens <= tokens
            if full and segment.state is SegmentState.OPEN:
                segment.move(SegmentState.SEALED)
                sealed.append(segment)
        return sealed

    def indexed(self, host_tokens: int) -> int:
        """Leading segments that are indexed and lie within host tokens ``[0, host_tokens)``."""
        count = 0
        for segment in self.segments[: host_tokens // self.segment_tokens]:
            if segment.state is not SegmentState.INDEXED:
                break
            count += 1
        return count
