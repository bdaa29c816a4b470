# SPDX-License-Identifier: Apache-2.0
"""Planted-number questions over a long document: `python -m vllm_retrieval_attn.evaluation.needles`.

Sentences of the form "The special magic number for amber-falcon is: 4815162." stand at even distances in technical
English (the docstrings of Python's standard library); each question asks for one of them.
"""

import argparse
import ast
import json
import random
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FIRST = [
    "amber",
    "bronze",
    "cobalt",
    "crimson",
    "golden",
    "hidden",
    "ivory",
    "jade",
    "marble",
    "silver",
    "velvet",
    "quiet",
]
_SECOND = [
    "falcon",
    "harbor",
    "lantern",
    "meadow",
    "orchard",
    "pepper",
    "river",
    "saddle",
    "timber",
    "walnut",
    "winter",
    "thistle",
]


def filler() -> str:
    """Docstrings of the standard library, in a fixed order: some megabytes of technical English."""
    parts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    parts.append(text)
    return "\n\n".join(parts)


@dataclass
class Question:
    """One question about a document; ``position`` is the token where its fact stands."""

    key: str
    number: str
    position: int
    prompt: list[int]


def planted_document(
    tokenizer: Any, length: int, count: int, seed: int = 0, text: str | None = None, tail: int = 0
) -> tuple[list[int], list[tuple[str, str, int]]]:
    """A document of about ``length`` tokens with ``count`` planted facts.

    Args:
        text: what to plant them in, from its begin; None for ``filler()``, from some place.
        tail: tokens of the text to add at the end, without facts.

    Returns:
        Its token ids, and (key, number, position) of each fact.

    Raises:
        ValueError: ``text`` is too short.
    """
    rng = random.Random(seed)
    keys = rng.sample([f"{a}-{b}" for a in _FIRST for b in _SECOND], count)
    ids = tokenizer.encode(filler() if text is None else text, add_special_tokens=False)
    if text is not None and len(ids) < length + tail:
        raise ValueError(f"the text is too short: it has {len(ids)} tokens, {length + tail} are needed")
    start = rng.randrange(max(1, len(ids) - length)) if text is None else 0
    ids = (ids + ids)[start : start + length + tail]
    facts = []
    document: list[int] = [] if keys else ids[:length]
    for number, key in enumerate(keys):
        value = str(rng.randrange(1_000_000, 10_000_000))
        sentence = tokenizer.encode(
            f"\n\nThe special magic number for {key} is: {value}.\n\n", add_special_tokens=False
        )
        begin, end = length * number // count, length * (number + 1) // count
        middle = (begin + end) // 2
        document += ids[begin:middle]
        facts.append((key, value, len(document)))
        document += sentence + ids[middle + len(sentence) : end]
    return document[:length] + ids[length:], facts


def question(tokenizer: Any, key: str) -> list[int]:
    """Token ids of the question for one fact, to follow the document."""
    ids: list[int] = tokenizer.encode(
        f"\n\nQuestion: What is the special magic number for {key}?\nAnswer:", add_special_tokens=False
    )
    return ids


def questions(tokenizer: Any, length: int, count: int, seed: int = 0) -> list[Question]:
    """``count`` questions over one planted document; prompts are ``length`` tokens or a little less."""
    document, facts = planted_document(tokenizer, length - 40, count, seed)
    return [Question(key, number, position, document + question(tokenizer, key)) for key, number, position in facts]


def main() -> None:
    from transformers import AutoTokenizer

    from vllm_retrieval_attn.bench.engine import InProcessEngine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", choices=("full", "attention", "flat", "none"), default="attention")
    parser.add_argument("--length", type=int, default=16_000)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1, help="questions in one batch")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="JSON: arguments of vllm.LLM; key retrieval: our knobs"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from vllm.platforms import current_platform

    options = dict(args.options)
    knobs = {**options.pop("retrieval", {}), "index": args.mode}
    backend = "retrieval" if args.mode != "full" else ("CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN")
    engine = InProcessEngine(
        args.model,
        knobs if args.mode != "full" else None,
        backend,
        max_model_len=args.length + args.tokens + 1,
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    asked = questions(tokenizer, args.length, args.count, args.seed)
    rows = []
    for first in range(0, len(asked), args.at_once):
        group = asked[first : first + args.at_once]
        begin = time.perf_counter()
        answers = engine.run(
            [q.prompt for q in group], temperature=0, max_tokens=args.tokens, ignore_eos=True, logprobs=2
        )
        seconds = time.perf_counter() - begin
        for question, answer in zip(group, answers, strict=True):
            rows.append(
                {
                    "mode": args.mode,
                    "prompt_tokens": len(question.prompt),
                    "position": question.position,
                    "expected": question.number,
                    "right": question.number in answer.text,
                    "text": answer.text,
                    "tokens": answer.tokens,
                    "logprobs": answer.logprobs,
                    "seconds": round(seconds, 2),
                }
            )
            print(f"{question.number} {rows[-1]['right']} {answer.text!r} {seconds:.1f} s", flush=True)
    right = sum(row["right"] for row in rows)
    print(f"{args.mode}: {right} of {len(rows)} right; most paged blocks held: {max(engine.max_blocks.values())}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "max_blocks": max(engine.max_blocks.values())}))
    engine.close()


if __name__ == "__main__":
    main()
