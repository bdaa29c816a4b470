# SPDX-License-Identifier: Apache-2.0
"""Which share of the rows CPU lanes are handed: the one with which reading a layer's rows takes least."""

from dataclasses import dataclass, field

from vllm_retrieval_attn.device.decode_step import WHOLE_SHARE

SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625)
_FIRST = (0, 2)
"""Where the search begins, by the size of batches, of larger ones with the last plus one: one row is read as fast
without lanes (docs/benchmarks.md, 2026-11-27)."""
_TRIAL, _PERIOD, _QUIET_PERIOD = 8, 128, 1024
"""Steps with a neighbouring share, of so many; of so many where lanes are handed nothing, as they sleep there."""
_WAKING = 4
"""Steps of a trial in which lanes may still be waking up."""
_GAIN = 0.98
"""What a neighbour's time must be less than, in the present one's, to take its place."""


@dataclass
class _Search:
    """For batches of one size: the best share so far, the neighbour tried next, the step within the period."""

    best: int
    step: int = 0
    upwards: bool = True
    times: dict[int, list[float]] = field(default_factory=dict)

    @property
    def period(self) -> int:
        return _PERIOD if self.best else _QUIET_PERIOD

    @property
    def neighbour(self) -> int:
        up = self.upwards if self.best else True
        at = self.best + (1 if up else -1)
        return at if at < len(SHARES) else self.best - 1

    def next(self) -> int:
        """The share of the next step, as a place in SHARES."""
        tries = self.step % self.period >= self.period - _TRIAL - _WAKING
        self.step += 1
        return self.neighbour if tries else self.best

    def learn(self, at: int, microseconds: float) -> None:
        if at not in (self.best, self.neighbour):
            return  # of a trial that is over
        found = self.times.setdefault(at, [])
        found.append(microseconds)
        del found[:-_TRIAL]
        if at == self.neighbour and len(found) == _TRIAL and len(self.times.get(self.best, ())) == _TRIAL:
            if _middle(found) < _GAIN * _middle(self.times[self.best]):
                self.best = at
            else:
                self.upwards = not self.upwards
            self.times, self.step = {}, 0


def _middle(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


class LaneShare:
    """Shares by the size of batches: batches of up to 1, 2, 4, 8, ... rows have one each."""

    def __init__(self) -> None:
        self._searches: dict[int, _Search] = {}

    def _search(self, rows: int) -> _Search:
        size = max(rows - 1, 0).bit_length()
        first = _FIRST[size] if size < len(_FIRST) else _FIRST[-1] + 1
        return self._searches.setdefault(size, _Search(first))

    def of(self, rows: int) -> int:
        """In units of 1 / WHOLE_SHARE, for the next step of ``rows`` rows with host tokens."""
        return round(SHARES[self._search(rows).next()] * WHOLE_SHARE)

    def learn(self, rows: int, share: int, microseconds: float) -> None:
        """A step with this share of :meth:`of` took so long to read a layer's rows."""
        self._search(rows).learn(SHARES.index(share / WHOLE_SHARE), microseconds / rows)

    def all(self) -> dict[str, float]:
        """Shares by the most rows of the batch."""
        return {str(1 << size): SHARES[search.best] for size, search in sorted(self._searches.items())}
