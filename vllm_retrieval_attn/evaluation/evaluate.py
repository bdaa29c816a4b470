# SPDX-License-Identifier: Apache-2.0
"""Quality of each mode beside full attention: questions over long documents, perplexity and KL on a text.

Answers come from what evaluation/runners.py starts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from rich.table import Table

from vllm_retrieval_attn.evaluation.runners import FULL, Runner, Scores, Starts
from vllm_retrieval_attn.evaluation.tasks import GENERATORS, PROSE, TASKS, Encode, Passage, Task, passages

SCORE_TOKENS = 48


class Row(TypedDict):
    """One task at one length in one mode.

    ``right`` and ``same_as_full`` are shares of ``n`` answers, ``kl`` (nats) and ``ppl`` are over ``n`` tokens,
    ``rows_mean`` is the host rows that a decode step read for a KV head; None where a figure does not apply.
    """

    mode: str
    task: str
    length: int
    n: int
    right: float | None
    same_as_full: float | None
    kl: float | None
    ppl: float | None
    rows_mean: float | None


@dataclass(frozen=True)
class Settings:
    """What to ask: ``lengths`` in tokens, ``count`` documents a task and length but where ``counts`` names another,
    ``text`` to make them of."""

    text: str
    tasks: Sequence[str] = TASKS
    lengths: Sequence[int] = (4096,)
    count: int = 4
    counts: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    score_tokens: int = SCORE_TOKENS


def divergence(full: Scores, other: Scores) -> list[float]:
    """KL(full || other) of each token in nats.

    Over tokens that both know; unless that is the whole vocabulary, all others count as one token, which gives a lower
    bound.
    """
    found = []
    for row in range(len(full.true)):
        _, ours, theirs = np.intersect1d(full.ids[row], other.ids[row], assume_unique=True, return_indices=True)
        p, q = full.logprobs[row][ours].astype(np.float64), other.logprobs[row][theirs].astype(np.float64)
        if not (full.whole and other.whole):
            p, q = _with_rest(p), _with_rest(q)
        likely = p > -np.inf
        total = float(np.sum(np.exp(p[likely]) * (p[likely] - q[likely])))
        found.append(max(0.0, total))  # rounding can leave a little less than 0
    return found


def _with_rest(logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(K + 1,) log-probabilities with what is left of 1 as the last; never 0, which rounding could make of it."""
    rest = max(1.0 - float(np.exp(logprobs).sum()), 1e-9)
    return np.append(logprobs, np.log(rest))


def perplexity(scores: Sequence[Scores]) -> float:
    """Perplexity of the text's tokens in all passages."""
    return float(np.exp(-np.concatenate([score.true for score in scores]).mean()))


Advance = Callable[[str, int], None]


@dataclass
class _Work:
    """What is asked, and full attention's answers, for each (task, length)."""

    tasks: dict[tuple[str, int], list[Task]] = field(default_factory=dict)
    passages: dict[tuple[str, int], list[Passage]] = field(default_factory=dict)
    replies: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    scores: dict[tuple[str, int], list[Scores]] = field(default_factory=dict)


def _leading(runner: Runner) -> list[int]:
    """Ids that the tokenizer sets before a text, such as BOS."""
    plain, special = runner.encode("text"), runner.encode("text", special=True)
    ahead = len(special) - len(plain)
    return special[:ahead] if ahead > 0 and special[ahead:] == plain else []


def _make(runner: Runner, settings: Settings) -> _Work:
    work = _Work()
    encode: Encode = runner.encode
    begin = _leading(runner)
    seed = settings.seed
    for length in settings.lengths:
        room = length - len(begin)
        for name in settings.tasks:
            count = settings.counts.get(name, settings.count)
            if name == PROSE:
                found = passages(encode, settings.text, room, count, seed, settings.score_tokens)
                work.passages[name, length] = [Passage(begin + part.prompt, part.tokens) for part in found]
            else:
                made = GENERATORS[name](encode, settings.text, room, count, seed)
                work.tasks[name, length] = [
                    Task(task.task, begin + task.prompt, task.expected, task.max_tokens) for task in made
                ]
    return work


def _share(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)


def _mean_taken(rows: list[int]) -> float | None:
    """The mean of what was told since the last call."""
    mean = round(sum(rows) / len(rows), 1) if rows else None
    rows.clear()
    return mean


def _run_mode(mode: str, runner: Runner, work: _Work, advance: Advance) -> list[Row]:
    """All of the work in one mode; that of full attention is kept to compare with."""
    rows: list[Row] = []
    for (name, length), tasks in work.tasks.items():
        what, replies = f"{mode}: {name} at {length:,} tokens", []
        advance(what, 0)
        for task in tasks:
            replies.append(runner.answer(task))
            advance(what, 1)
        if mode == FULL:
            work.replies[name, length] = replies
        reference = None if mode == FULL else work.replies.get((name, length))
        rows.append(
            Row(
                mode=mode,
                task=name,
                length=length,
                n=len(tasks),
                right=_share([task.right(reply) for task, reply in zip(tasks, replies, strict=True)]),
                same_as_full=None
                if reference is None
                else _share([task.same(*both) for task, *both in zip(tasks, reference, replies, strict=True)]),
                kl=None,
                ppl=None,
                rows_mean=_mean_taken(runner.rows_read),
            )
        )
    for (name, length), parts in work.passages.items():
        what, scores = f"{mode}: {name} at {length:,} tokens", []
        advance(what, 0)
        for part in parts:
            if (found := runner.score(part)) is not None:
                scores.append(found)
            advance(what, 1)
        if mode == FULL:
            work.scores[name, length] = scores
        truth = [] if mode == FULL else work.scores.get((name, length), [])
        kl = [value for ours, full in zip(scores, truth, strict=False) for value in divergence(full, ours)]
        rows.append(
            Row(
                mode=mode,
                task=name,
                length=length,
                n=sum(len(score.true) for score in scores),
                right=None,
                same_as_full=None,
                kl=float(np.mean(kl)) if kl else None,
                ppl=perplexity(scores) if scores else None,
                rows_mean=_mean_taken(runner.rows_read),
            )
        )
    return rows


def steps(starts: Starts, settings: Settings) -> int:
    """Answers that :func:`evaluate` reports to ``advance``."""
    counts = (settings.counts.get(name, settings.count) for name in settings.tasks)
    return len(starts) * len(settings.lengths) * sum(counts)


def evaluate(starts: Starts, settings: Settings, advance: Advance = lambda what, done: None) -> Iterator[Row]:
    """Run every task in every mode, one mode after the other; each is closed before the next starts.

    Args:
        advance: called with what is being done and how many answers came since the last call.

    Yields:
        A mode's rows once it is through.

    Raises:
        ValueError: one line that says what to change.
    """
    work: _Work | None = None
    for mode, start in starts:
        advance(f"{mode}: starting", 0)
        runner = start()
        try:
            if max(settings.lengths) > runner.limit:
                raise ValueError(f"retrieval: {mode} takes {runner.limit} tokens at most; lower --lengths")
            work = work or _make(runner, settings)
            rows = _run_mode(mode, runner, work, advance)
        finally:
            runner.close()
        yield from rows


def table(rows: Sequence[Row]) -> Table:
    """Modes side by side; a line for each task and length."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    shown = Table(title="share right (share identical to full attention); prose: perplexity (KL per token, nats)")
    shown.add_column("task")
    for name in ("tokens", "n", *modes):
        shown.add_column(name, justify="right")
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        found = {row["mode"]: row for row in rows if (row["task"], row["length"]) == (task, length)}
        cells = [_cell(found[mode]) if mode in found else "" for mode in modes]
        shown.add_row(task, f"{length:,}", str(max(row["n"] for row in found.values())), *cells)
    return shown


def _cell(row: Row) -> str:
    main, beside = (row["ppl"], row["kl"]) if row["task"] == PROSE else (row["right"], row["same_as_full"])
    if main is None:
        return "-"
    shown = f"{main:.2f}"
    if beside is None:
        return shown
    return f"{shown} ({beside:.2g})" if row["task"] == PROSE else f"{shown} ({beside:.2f})"
