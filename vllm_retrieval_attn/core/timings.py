"""Where the time of a decode step goes, per layer: running sums, cheap enough to stay on."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass
class Timings:
    """Sums over layers that searched the host, in nanoseconds unless named otherwise.

    Attributes:
        layers: layers summed.
        query_out: CUDA: from the start of the layer until its queries lie in host memory. CPU: 0.
        wait: CUDA: from then until the answer is complete. CPU: what is left of that after the paged part.
        search: the slowest lane's search.
        merge: bringing the answer back and merging it (on CUDA: issuing that work).
        total: the whole layer on the CPU clock.
        codes, rows: keys scored by code and rows read by all lanes.
    """

    layers: int = 0
    query_out: int = 0
    wait: int = 0
    search: int = 0
    merge: int = 0
    total: int = 0
    codes: int = 0
    rows: int = 0

    def add_layer(
        self, begin: int, posted: int, waiting: int, answered: int, end: int, search: tuple[float, int, int]
    ) -> None:
        """Add one layer; the stamps are ``perf_counter_ns`` values in order."""
        self.layers += 1
        self.query_out += posted - begin
        self.wait += answered - waiting
        self.search += int(search[0] * 1e9)
        self.merge += end - answered
        self.total += end - begin
        self.codes += search[1]
        self.rows += search[2]

    def take(self) -> dict[str, Any]:
        """The sums so far, as a dict; starts again from zero."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in values:
            setattr(self, name, 0)
        return values
