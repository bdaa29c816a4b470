"""How much of the attention to planted facts the index keeps: for each captured KV head, over the answers' queries.

    python -m vllm_retrieval_attn.bench.facts --model DIR --qkv FILE

The capture must be one of bench/capture.py of this model, with its questions and seed as they are there by default:
where the facts lie is found by planting them again.
"""

import argparse
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_retrieval_attn.bench.capture_file import Head, load
from vllm_retrieval_attn.bench.planting import plant
from vllm_retrieval_attn.index.attention import ClusteredIndex
from vllm_retrieval_attn.index.segment import NODE

QUESTIONS, ANSWER_TOKENS, DECODE, SEED = 8, 10, 48, 0
"""Defaults of bench.capture.capture."""
FACT_TOKENS = 30
CARRIES = 0.1
"""A query head carries facts if so much of its attention, mean over the answers, falls on the fact asked for."""


def fact_mass(head: Head, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Attention to the fact asked for, and the part of it that the index attends to exactly.

    Args:
        positions: where each fact begins in the prompt.

    Returns:
        (g,) each: mean over the answers' queries, of the whole attention; share kept.
    """
    keys, values = (rows[head.sink : head.bound] for rows in (head.K, head.V))
    index = ClusteredIndex(head.scale, keys.shape[1], segment_tokens=len(keys) // NODE * NODE)
    index.outside = np.concatenate((head.K[: head.sink], head.K[head.bound :]))
    index.build(keys, values, head.Qprompt.astype(np.float32))
    total, kept = np.zeros(len(head.q)), np.zeros(len(head.q))
    for number, position in enumerate(positions):
        first = max(0, position - head.sink)
        for step in range(number * ANSWER_TOKENS, (number + 1) * ANSWER_TOKENS):
            queries = np.ascontiguousarray(head.q[:, step], np.float32)
            scores = queries @ keys.astype(np.float32).T * head.scale
            top = scores.max(1)
            lse = np.logaddexp(top + np.log(np.exp(scores - top[:, None]).sum(1)), head.lsw[:, step])
            weights = np.exp(scores - lse[:, None])[:, first : first + FACT_TOKENS]
            (rows, *_) = index.attended(queries, 0.0)
            exact = np.isin(np.arange(first, first + weights.shape[1]), rows)
            total += weights.sum(1)
            kept += weights @ exact
    return total / (len(positions) * ANSWER_TOKENS), kept / total.clip(1e-30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, for its tokenizer")
    parser.add_argument("--qkv", required=True, type=Path)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    heads = load(arguments.qkv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    first = heads[0]
    window = len(first.K) - first.bound
    _, facts = plant(tokenizer, None, len(first.K), first.sink, window, DECODE, QUESTIONS, SEED)
    table = Table(box=box.SIMPLE_HEAD, title="query heads that carry facts: attention to the fact asked for")
    for name in ("KV head", "query head", "mass", "share kept"):
        table.add_column(name, justify="left" if name == "KV head" else "right")
    for head in heads:
        total, kept = fact_mass(head, [position for _, _, position in facts])
        for number in np.flatnonzero(total >= CARRIES):
            table.add_row(head.name, str(number), f"{total[number]:.3f}", f"{kept[number]:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
