"""`vllm-retrieval index-study`: every kind of index on captured queries, keys and values, over a sweep of budgets."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_retrieval_attn.bench.capture_file import Head
from vllm_retrieval_attn.index.attention import ClusteredIndex
from vllm_retrieval_attn.index.base import AttentionIndex, Floats
from vllm_retrieval_attn.index.registry import KINDS, make_index

BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
TOP = 100
_COLD_BYTES = 96 << 20
"""Memory read between timed searches, so that they meet cold caches (L3 is 32 MB here)."""


@dataclass
class Row:
    """One KV head, kind and budget; means over its query heads and decode queries unless named otherwise.

    Attributes:
        budget: share of keys that may be scored; None: flat, or what `attention` calibrated.
        recall_mean: recall@100 of the keys attended to exactly. recall_p10: its 10th percentile over query heads.
        mass: share of the attention to indexed keys that falls on them.
        output_error: relative L2 error of the output merged with sink and window.
        keys_scanned_share: keys scored, by whatever means, of all indexed.
        bytes_touched_share: bytes read for the KV head divided by the query heads that share the reads, of the fp16
        keys'. bytes_alone_share: the same if every query head had to read all by itself. us_per_query: one thread,
        cold cache, of one query head. build_ms_per_1k: one thread. index_bytes_per_key: bytes.
    """

    head: str
    kind: str
    budget: float | None
    queries: str
    n: int
    recall_mean: float
    recall_p10: float
    mass: float
    output_error: float
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


def study_head(
    head: Head, kinds: list[str], budgets: list[float], queries: str = "decode", most: int = 32, timed: bool = True
) -> Iterator[Row]:
    """Rows of one captured KV head.

    Args:
        queries: ``decode`` (out of distribution: an index is built from keys and searched with queries) or ``keys`` (in
            distribution). most: test queries. timed: measure time; False leaves ``us_per_query`` 0.
    """
    keys, values = head.K[head.sink : head.bound], head.V[head.sink : head.bound]
    n, dim = keys.shape
    prompt = np.asarray(np.concatenate((head.Qprompt, head.Qprompt_strided), axis=1), np.float32)
    recent = np.asarray(head.Qprompt, np.float32)
    q, osw, lsw = _queries(head, queries, most)
    exact_keys = keys.astype(np.float32)
    truth = []
    for row, o, lse in zip(q, osw, lsw, strict=True):
        scores = row @ exact_keys.T * np.float32(head.scale)
        top = scores.max(1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(1, keepdims=True)
        out = weights @ values.astype(np.float32) / total
        best = np.argpartition(-scores, min(TOP, n) - 1, axis=1)[:, :TOP]
        truth.append((weights / total, best, merge(out, (top + np.log(total))[:, 0], o, lse)))
    for kind in kinds:
        index = _make(kind, head, dim)
        begin = time.perf_counter()
        index.build(keys, values, prompt if kind == "roar" else recent)
        build_ms = (time.perf_counter() - begin) * 1e3 / (n / 1000)
        sweep: list[float | None] = [*budgets]
        if kind == "flat":
            sweep = [None]
        elif kind == "attention":
            sweep.append(None)
        for budget in sweep:
            asked = 1.0 if kind == "flat" else (budget or 0.0)
            recall, mass, error = [], [], []
            index.take_touched()
            for row, o, lse, (weights, best, wanted) in zip(q, osw, lsw, truth, strict=True):
                out, found = index.attend(row, asked)
                difference = np.linalg.norm(merge(out, found, o, lse) - wanted, axis=1)
                error.append(difference / np.linalg.norm(wanted, axis=1))
                chosen = np.zeros((len(row), n), bool)
                for h, rows in enumerate(index.attended(row, asked)):
                    chosen[h, rows] = True
                recall.append(np.take_along_axis(chosen, best, 1).mean(1))
                mass.append((weights * chosen).sum(1))
            touched = index.take_touched()
            bytes_alone = touched.bytes / touched.queries / (n * dim * 2)
            shared = kind in ("attention", "flat")  # one read serves the group
            yield Row(
                head.name,
                kind,
                budget,
                queries,
                n,
                float(np.mean(recall)),
                float(np.quantile(np.mean(recall, 0), 0.1)),
                float(np.mean(mass)),
                float(np.mean(error)),
                touched.keys / touched.queries / n,
                bytes_alone / (q.shape[1] if shared else 1),
                bytes_alone,
                _microseconds(index, q, asked) if timed else 0.0,
                build_ms,
                index.index_bytes / n,
            )


def _make(kind: str, head: Head, dim: int) -> AttentionIndex:
    if kind != "attention":
        return make_index(kind, head.scale, dim)
    # Segments as served; a remainder is scanned exactly, so a short capture gets shorter ones.
    n = head.bound - head.sink
    segments = max(1, round(n / 8192))
    tokens = n // segments // 256 * 256
    if not tokens:
        return make_index("flat", head.scale, dim)
    index = ClusteredIndex(head.scale, dim, segment_tokens=tokens)
    index.outside = np.concatenate((head.K[: head.sink], head.K[head.bound :]))
    return index


def _microseconds(index: AttentionIndex, q: Floats, budget: float) -> float:
    """Median time of one query head's attention, one thread, cold cache."""
    junk = np.ones(_COLD_BYTES // 8)
    index.attend(q[0], budget)
    seconds = []
    for row in q[:8]:
        junk += 1.0
        begin = time.perf_counter()
        index.attend(row, budget)
        seconds.append((time.perf_counter() - begin) / len(row))
    return float(np.median(seconds)) * 1e6


def study(
    heads: list[Head],
    kinds: list[str],
    budgets: list[float],
    queries: str = "decode",
    most: int = 32,
    timed: bool = True,
    advance: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Rows of all heads; Faiss and BLAS on one thread. ``advance`` is called after each head.

    Raises:
        ValueError: an unknown kind.
    """
    import faiss
    import torch

    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"no index kind {unknown[0]!r}: there are {', '.join(KINDS)}")
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for head in heads:
        rows += study_head(head, kinds, budgets, queries, most, timed)
        advance(head.name)
    return rows


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """Means over heads for each kind and budget; ``recall_p10`` is the 10th percentile over heads' means."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.budget), []).append(row)
    found = []
    for (kind, budget), members in groups.items():
        line: dict[str, Any] = {"kind": kind, "budget": budget, "heads": len(members)}
        for name, value in asdict(members[0]).items():
            if isinstance(value, float) and name not in ("budget", "recall_p10"):
                line[name] = float(np.mean([getattr(row, name) for row in members]))
        line["recall_p10"] = float(np.quantile([row.recall_p10 for row in members], 0.1))
        line["mass_worst"] = float(min(row.mass for row in members))
        found.append(line)
    return found


def plot(rows: list[Row], path: Path) -> None:
    """Recall@100 and output error against keys scanned and bytes touched, one line a kind, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    lines: dict[str, list[dict[str, Any]]] = {}
    for line in summary(rows):
        if line["budget"] is not None or line["kind"] == "flat":
            lines.setdefault(line["kind"], []).append(line)
    panels = [
        ("keys_scanned_share", "recall_mean"),
        ("keys_scanned_share", "output_error"),
        ("bytes_alone_share", "output_error"),
    ]
    names = {
        "keys_scanned_share": "keys scanned, %",
        "bytes_alone_share": "bytes read for one query head, % of the fp16 keys",
        "recall_mean": "recall@100",
        "output_error": "relative error of the merged output",
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5))
    for axis, (x, y) in zip(axes, panels, strict=True):
        for number, (kind, members) in enumerate(lines.items()):
            if kind == "flat" and y == "output_error":
                continue  # zero up to rounding; on a log axis it would flatten the others
            members = sorted(members, key=lambda line: line[x])
            axis.plot(
                [100 * m[x] for m in members], [m[y] for m in members], marker="o", label=kind, color=f"C{number}"
            )
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
