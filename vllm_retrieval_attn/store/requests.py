# SPDX-License-Identifier: Apache-2.0
"""What one admitted request holds on the host."""

from dataclasses import dataclass, field


@dataclass
class RequestStore:
    """Attributes:
    request_id, epoch: the admission that this belongs to.
    slot: its page table in the shared file. generation: of that table.
    pages: page numbers, in token order.
    tokens: host tokens written so far, counted from the end of the sink region.
    sketched: whether all host tokens have codes on the GPU. codes: page numbers of these, in token order.
    space: which space codes them (sketch/space.py).
    sink: slot that the sinks are to be written to, -1: none.
    """

    request_id: str
    epoch: int
    slot: int
    generation: int
    pages: list[int] = field(default_factory=list)
    tokens: int = 0
    sketched: bool = False
    codes: list[int] = field(default_factory=list)
    space: int = 0
    sink: int = -1

    def written(self, tokens: int) -> None:
        """Record that host tokens ``[0, tokens)`` are written. Tokens may be written again, never taken back."""
        self.tokens = max(self.tokens, tokens)
