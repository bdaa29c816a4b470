# SPDX-License-Identifier: Apache-2.0
"""What a capture has a model read: a text with planted facts (evaluation/needles.py), and questions about them."""

from dataclasses import dataclass
from typing import Any

from vllm_retrieval_attn.evaluation import needles

_ROOM = 64  # tokens of text for each planted fact, so that facts (about 25 tokens) do not touch


@dataclass
class Tokens:
    """What a capture feeds the model."""

    prompt: list[int]
    questions: list[list[int]]
    """Each is asked right after the prompt, the others forgotten."""
    continuation: list[int]
    """Read after the prompt, the questions forgotten."""


def plant(
    tokenizer: Any, text: str | None, length: int, sink: int, window: int, decode: int, count: int, seed: int
) -> tuple[Tokens, list[tuple[str, str, int]]]:
    """The prompt of ``length`` tokens with ``count`` facts in its indexed part, questions, and the text that follows.

    Returns:
        The tokens, and (key, number, position) of each fact.
    """
    start = tokenizer.encode("")  # what the model expects first, such as <bos>
    planted = length - window - len(start)
    if planted - sink < _ROOM * max(count, 1):
        needed = window + len(start) + sink + _ROOM * max(count, 1)
        raise ValueError(f"{length} tokens are too few for {count} questions; at least {needed} are needed")
    document, facts = needles.planted_document(tokenizer, planted, count, seed, text, tail=window + decode)
    document = start + document
    # The answer's first words are given, for models that would not go on with the number at once.
    asked = [
        needles.question(tokenizer, key)
        + tokenizer.encode(f" The special magic number for {key} is:", add_special_tokens=False)
        for key, _, _ in facts
    ]
    where = [(key, number, position + len(start)) for key, number, position in facts]
    return Tokens(document[:length], asked, document[length:]), where
