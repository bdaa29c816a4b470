# SPDX-License-Identifier: Apache-2.0
"""`vllm-retrieval index-study`: ways to choose rows on captured queries, keys and values."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.baselines.registry import KINDS, make_index
from vllm_retrieval_attn.bench.capture_file import Head
from vllm_retrieval_attn.bench.rules import CandidatesRule, Rule, SketchRule, space_of
from vllm_retrieval_attn.index.scan import CAN_SCAN
from vllm_retrieval_attn.sketch.sampling import Limits, attend
from vllm_retrieval_attn.sketch.space import Floats

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
ROWS = (128, 256, 512, 1024)
TINY = 1e-12
"""A tau that leaves the limit to the rows."""
TOP = 100
_COLD_BYTES = 96 << 20
"""Memory read between timed searches, so that they meet cold caches (L3 is 32 MB here)."""


@dataclass
class Row:
    """One KV head, kind and budget; means over its query heads and decode queries unless named otherwise.

    Attributes:
        kind: ``attention`` or a kind of baselines/. via: of ``attention``, ``sketch`` (sampled over all codes),
            ``faiss`` (as CPU workers do) or ``vnni`` (as they do where the processor can); empty for others.
        budget: share of keys that may be scored, or for ``attention`` the rows asked for; None: all.
        recall_mean: recall@100 of the keys attended to exactly. recall_p10: its 10th percentile over query heads.
        mass: share of the attention to indexed keys that falls on them.
        output_error: relative L2 error of the output merged with sink and window.
        lse_bias: signed error of the merged log-sum-exp. rows_mean: rows read.
        keys_scanned_share: keys scored, by whatever means, of all indexed.
        bytes_touched_share: bytes read for the KV head divided by the query heads that share the reads, of the fp16
        keys'. bytes_alone_share: the same if every query head had to read all by itself.
        us_per_query: one thread, cold cache, of one query head. build_ms_per_1k: one thread.
        index_bytes_per_key: bytes.
    """

    head: str
    kind: str
    via: str
    budget: float | None
    queries: str
    n: int
    recall_mean: float
    recall_p10: float
    mass: float
    output_error: float
    lse_bias: float
    rows_mean: float
    keys_scanned_share: float
    bytes_touched_share: float
    bytes_alone_share: float
    us_per_query: float
    build_ms_per_1k: float
    index_bytes_per_key: float


def merge(a: Floats, a_lse: Floats, b: Floats, b_lse: Floats) -> Floats:
    """Outputs (g, d) of two disjoint sets of keys merged by their log-sum-exps (g,)."""
    both = np.logaddexp(a_lse, b_lse)
    merged: Floats = a * np.exp(a_lse - both)[:, None] + b * np.exp(b_lse - both)[:, None]
    return merged


def _queries(head: Head, source: str, most: int) -> tuple[Floats, Floats, Floats]:
    """(t, g, d) test queries, with output (t, g, d) and LSE (t, g) of what is not indexed (none for keys)."""
    if source == "decode":
        stride = max(1, head.q.shape[1] // most)
        q, osw, lsw = (np.asarray(x[:, ::stride], np.float32).swapaxes(0, 1) for x in (head.q, head.osw, head.lsw))
        return np.ascontiguousarray(q), osw, lsw
    keys = np.asarray(head.K[head.sink : head.bound], np.float32)
    picked = keys[np.random.default_rng(0).choice(len(keys), most, replace=False)]
    # As large as queries are, so that the softmax is alike.
    size = np.linalg.norm(np.asarray(head.q, np.float32), axis=-1).mean() / np.linalg.norm(picked, axis=-1).mean()
    q = np.repeat(picked[:, None] * size, head.q.shape[0], axis=1)
    return np.ascontiguousarray(q), np.zeros_like(q), np.full(q.shape[:2], -np.inf, np.float32)


class _Case:
    """A captured head with its test queries and the truth about them."""

    def __init__(self, head: Head, queries: str, most: int) -> None:
        self.head = head
        self.keys, self.values = head.K[head.sink : head.bound], head.V[head.sink : head.bound]
        self.n, self.dim = self.keys.shape
        self.q, self.osw, self.lsw = _queries(head, queries, most)
        exact_keys, exact_values = self.keys.astype(np.float32), self.values.astype(np.float32)
        self.weights, self.best, self.wanted, self.lse = [], [], [], []
        for row, o, lse in zip(self.q, self.osw, self.lsw, strict=True):
            scores = row @ exact_keys.T * np.float32(head.scale)
            top = scores.max(1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(1, keepdims=True)
            mine = (top + np.log(total))[:, 0]
            self.weights.append(weights / total)
            self.best.append(np.argpartition(-scores, min(TOP, self.n) - 1, axis=1)[:, :TOP])
            self.wanted.append(merge(weights @ exact_values / total, mine, o, lse))
            self.lse.append(np.logaddexp(mine, lse))

    def compare(self, number: int, out: Floats, lse: Floats, read: npt.NDArray[np.bool_]) -> tuple[Any, ...]:
        """(g,) recall@100, mass, output error and LSE bias of one test query's result; ``read``: (g, n)."""
        wanted, o, outside = self.wanted[number], self.osw[number], self.lsw[number]
        error = np.linalg.norm(merge(out, lse, o, outside) - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        recall = np.take_along_axis(read, self.best[number], 1).mean(1)
        bias = np.logaddexp(lse, outside) - self.lse[number]
        return recall, (self.weights[number] * read).sum(1), error, bias


def study_head(
    head: Head,
    kinds: list[str],
    budgets: list[float],
    rows: list[int],
    queries: str = "decode",
    most: int = 32,
    candidates: int = 4096,
    learned: bool = True,
    timed: bool = True,
) -> Iterator[Row]:
    """Rows of one captured KV head.

    Args:
        kinds: of baselines/, swept over ``budgets``, and ``attention``, swept over ``rows``.
        queries: ``decode`` (out of distribution: an index is built from keys and searched with queries) or ``keys`` (in
            distribution). most: test queries. candidates, learned: of ``attention``, see bench/rules.py.
        timed: measure time; False leaves ``us_per_query`` 0.
    """
    case = _Case(head, queries, most)
    for kind in kinds:
        if kind == "attention":
            yield from _study_rules(case, rows, queries, candidates, learned, timed)
        else:
            yield from _study_baseline(case, kind, budgets, queries, timed)


def _study_rules(
    case: _Case, rows: list[int], queries: str, candidates: int, learned: bool, timed: bool
) -> Iterator[Row]:
    head, group = case.head, case.q.shape[1]
    space = space_of(head, learned)
    ways: list[Callable[[], Rule]] = [
        lambda: SketchRule(head, space),
        lambda: CandidatesRule(head, space, candidates, by_faiss=True),
    ]
    if CAN_SCAN:
        ways.append(lambda: CandidatesRule(head, space, candidates, by_faiss=False))
    for make in ways:
        begin = time.perf_counter()
        rule: Rule = make()
        build_ms = (time.perf_counter() - begin) * 1e3 / (case.n / 1000)
        for limit in rows:
            found, counts = [], []
            for number, (query, outside) in enumerate(zip(case.q, case.lsw, strict=True)):
                chosen, log_pi = rule.choose(query, outside, Limits(limit, TINY), number)
                read = np.zeros((group, case.n), np.bool_)
                read[:, chosen] = True
                out, lse = attend(case.keys, case.values, query, head.scale, chosen, log_pi)
                found.append(case.compare(number, out, lse, read))
                counts.append(len(chosen))
            recall, mass, error, bias = (np.array(part) for part in zip(*found, strict=True))
            mean_rows = float(np.mean(counts))
            touched = (rule.index_bytes + mean_rows * case.dim * 4) / (case.n * case.dim * 2)
            yield Row(
                head.name, "attention", rule.via, limit, queries, case.n,
                float(recall.mean()), float(np.quantile(recall.mean(0), 0.1)), float(mass.mean()), float(error.mean()),
                float(bias.mean()), mean_rows, 1.0, touched / group, touched,
                _rule_microseconds(rule, case, limit) if timed else 0.0, build_ms, rule.index_bytes / case.n,
            )  # fmt: skip


def _study_baseline(case: _Case, kind: str, budgets: list[float], queries: str, timed: bool) -> Iterator[Row]:
    head, group, n = case.head, case.q.shape[1], case.n
    prompt = np.asarray(np.concatenate((head.Qprompt, head.Qprompt_strided), axis=1), np.float32)
    index = make_index(kind, head.scale, case.dim)
    begin = time.perf_counter()
    index.build(case.keys, case.values, prompt if kind == "roar" else np.asarray(head.Qprompt, np.float32))
    build_ms = (time.perf_counter() - begin) * 1e3 / (n / 1000)
    for budget in [None] if kind == "flat" else budgets:
        asked = budget or 1.0
        found, counts = [], []
        index.take_touched()
        for number, row in enumerate(case.q):
            out, lse = index.attend(row, asked)
            read = np.zeros((group, n), np.bool_)
            for h, rows in enumerate(index.attended(row, asked)):
                read[h, rows] = True
            found.append(case.compare(number, out, lse, read))
            counts.append(read.sum(1).mean())
        recall, mass, error, bias = (np.array(part) for part in zip(*found, strict=True))
        touched = index.take_touched()
        alone = touched.bytes / touched.queries / (n * case.dim * 2)
        yield Row(
            head.name, kind, "", budget, queries, n,
            float(recall.mean()), float(np.quantile(recall.mean(0), 0.1)), float(mass.mean()), float(error.mean()),
            float(bias.mean()), float(np.mean(counts)), touched.keys / touched.queries / n,
            alone / (group if kind == "flat" else 1), alone,
            _microseconds(partial(index.attend, budget=asked), case.q) if timed else 0.0,
            build_ms, index.index_bytes / n,
        )  # fmt: skip


def _rule_microseconds(rule: Rule, case: _Case, limit: int) -> float:
    outside = case.lsw[0]

    def attend_rows(row: Floats) -> None:
        chosen, log_pi = rule.choose(row, outside, Limits(limit, TINY), 0)
        attend(case.keys, case.values, row, case.head.scale, chosen, log_pi)

    return _microseconds(attend_rows, case.q)


def _microseconds(call: Callable[[Floats], Any], q: Floats) -> float:
    """Median time of one query head's attention, one thread, cold cache."""
    junk = np.ones(_COLD_BYTES // 8)
    call(q[0])
    seconds = []
    for row in q[:8]:
        junk += 1.0
        begin = time.perf_counter()
        call(row)
        seconds.append((time.perf_counter() - begin) / len(row))
    return float(np.median(seconds)) * 1e6


def study(
    heads: list[Head],
    kinds: list[str],
    budgets: list[float],
    rows: list[int],
    queries: str = "decode",
    most: int = 32,
    candidates: int = 4096,
    learned: bool = True,
    timed: bool = True,
    advance: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Rows of all heads; Faiss and BLAS on one thread. ``advance`` is called after each head.

    Raises:
        ValueError: an unknown kind.
    """
    import faiss
    import torch

    known = [*KINDS, "attention"]
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ValueError(f"no index kind {unknown[0]!r}: there are {', '.join(known)}")
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    found: list[Row] = []
    for head in heads:
        found += study_head(head, kinds, budgets, rows, queries, most, candidates, learned, timed)
        advance(head.name)
    return found


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """Means over heads for each kind and budget; ``recall_p10`` is the 10th percentile over heads' means,
    ``error_worst`` the mean error of the worst tenth of the heads."""
    groups: dict[tuple[str, str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.via, row.budget), []).append(row)
    found = []
    for (kind, via, budget), members in groups.items():
        line: dict[str, Any] = {"kind": kind, "via": via, "budget": budget, "heads": len(members)}
        for name, value in asdict(members[0]).items():
            if isinstance(value, float) and name not in ("budget", "recall_p10"):
                line[name] = float(np.mean([getattr(row, name) for row in members]))
        line["recall_p10"] = float(np.quantile([row.recall_p10 for row in members], 0.1))
        errors = sorted(row.output_error for row in members)
        line["error_worst"] = float(np.mean(errors[-max(1, len(errors) // 10) :]))
        found.append(line)
    return found


def plot(rows: list[Row], path: Path) -> None:
    """Recall@100 and output error against rows read and bytes touched, one line a kind, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    lines: dict[str, list[dict[str, Any]]] = {}
    for line in summary(rows):
        lines.setdefault(f"{line['kind']} {line['via']}".strip(), []).append(line)
    panels = [
        ("rows_mean", "recall_mean"),
        ("rows_mean", "output_error"),
        ("bytes_touched_share", "output_error"),
    ]
    names = {
        "rows_mean": "rows read",
        "bytes_touched_share": "bytes read for one query head, share of the fp16 keys",
        "recall_mean": "recall@100",
        "output_error": "relative error of the merged output",
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5))
    for axis, (x, y) in zip(axes, panels, strict=True):
        for number, (kind, members) in enumerate(lines.items()):
            if kind == "flat" and y == "output_error":
                continue  # zero up to rounding; on a log axis it would flatten the others
            members = sorted(members, key=lambda line: line[x])
            axis.plot([m[x] for m in members], [m[y] for m in members], marker="o", label=kind, color=f"C{number}")
        axis.set_xscale("log")
        axis.set_xlabel(names[x])
        axis.set_ylabel(names[y])
        if y == "output_error":
            axis.set_yscale("log")
        for scaled in [axis.xaxis, axis.yaxis] if y == "output_error" else [axis.xaxis]:
            scaled.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            scaled.set_major_formatter(ticker.FormatStrFormatter("%g"))
            scaled.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].legend()
    keys = sorted({row.n for row in rows})
    figure.suptitle(f"{len({row.head for row in rows})} KV heads, {', '.join(f'{n:,}' for n in keys)} indexed keys")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
