"""What an index made anew from generated queries would gain over one made from the prompt's.

    python -m vllm_retrieval_attn.bench.drift --qkv FILE

The first FROM decode queries of a capture take the place of the prompt's, the last TO are searched for.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_retrieval_attn.bench.capture_file import Head, load
from vllm_retrieval_attn.bench.study import TOP, merge
from vllm_retrieval_attn.index.attention import ClusteredIndex
from vllm_retrieval_attn.index.flat import attend_exactly
from vllm_retrieval_attn.index.segment import NODE
from vllm_retrieval_attn.workers.slab_work import drift

FROM, TO, EVERY = 64, 32, 4


def measure(head: Head) -> Iterator[tuple[str, float, float, float, float]]:
    """What was made anew; then recall@100, output error, share of keys scanned, and drift of the queries used."""
    keys, values = (rows[head.sink : head.bound] for rows in (head.K, head.V))
    prompt, decode = head.Qprompt.astype(np.float32), head.q.astype(np.float32)
    early = decode[:, :FROM]
    cases = {"nothing": (prompt, prompt), "calibration": (prompt, early), "calibration, space": (early, early)}
    for name, (space, samples) in cases.items():
        index = ClusteredIndex(head.scale, keys.shape[1], segment_tokens=len(keys) // NODE * NODE)
        index.outside = np.concatenate((head.K[: head.sink], head.K[head.bound :]))
        index.build(keys, values, space)
        index.calibrate(samples)
        found = np.array([_compare(head, index, t) for t in range(decode.shape[1] - TO, decode.shape[1], EVERY)])
        flat = torch.from_numpy(np.ascontiguousarray(prompt.reshape(1, -1, keys.shape[1])))
        moment = flat.mT @ flat / flat.shape[1]
        far = drift(moment, torch.from_numpy(np.ascontiguousarray(samples.reshape(1, -1, keys.shape[1]))))
        touched = index.take_touched()
        yield name, *found.mean(0), touched.keys / touched.queries / len(keys), float(far)


def _compare(head: Head, index: ClusteredIndex, step: int) -> tuple[float, float]:
    queries = np.ascontiguousarray(head.q[:, step], np.float32)
    elsewhere = np.asarray(head.osw[:, step], np.float32), np.asarray(head.lsw[:, step], np.float32)
    exact = merge(*attend_exactly(index.rows, queries, head.scale), *elsewhere)
    error = np.linalg.norm(merge(*index.attend(queries, 0.0), *elsewhere) - exact, axis=1)
    best = np.argsort(-(queries @ index.rows[0].astype(np.float32).T), axis=1)[:, :TOP]
    recall = np.isin(best, index.attended(queries, 0.0)[0]).mean()
    return float(recall), float((error / np.linalg.norm(exact, axis=1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qkv", required=True, type=Path)
    rows: dict[str, list[tuple[float, ...]]] = {}
    for head in load(parser.parse_args().qkv):
        for name, *figures in measure(head):
            rows.setdefault(name, []).append(tuple(figures))
    table = Table("made anew", "recall@100", "error", "scanned", "drift", box=box.SIMPLE_HEAD)
    for name, all_figures in rows.items():
        recall, error, scanned, far = np.mean(all_figures, axis=0)
        table.add_row(name, f"{recall:.3f}", f"{error:.4f}", f"{scanned:.0%}", f"{far:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
