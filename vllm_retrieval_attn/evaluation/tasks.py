# SPDX-License-Identifier: Apache-2.0
"""Questions over long documents in RULER's manner (arXiv 2404.06654), in completion style.

Pure functions of (encode, text, length, count, seed). ``length`` is in tokens and holds prompt and answer together, as
in RULER, so that a model can be asked at its full context. ``encode`` gives token ids without special tokens.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

Encode = Callable[[str], list[int]]

_FIRST = ["amber", "bronze", "cobalt", "crimson", "golden", "hidden", "ivory", "jade", "silver", "velvet"]
_SECOND = ["falcon", "harbor", "lantern", "meadow", "orchard", "pepper", "river", "saddle", "timber", "walnut"]
_INTRO = "Some special magic numbers are hidden within the following text. Memorize them.\n\n"
_KEYS = 4
"""Facts in a multi-key document, of which one is asked for."""
_CROWD = 100
"""The same in a crowded one: all that the words above can name."""
_VALUES = 4
_HOPS = 4
"""Assignments after the first one in a chain of variables."""
_ZIPF = 2.0
"""Exponent of the word frequencies, RULER's. The three most frequent words are far apart then."""
_RANKS = 50
"""Coded words that may occur more than once."""


@dataclass(frozen=True)
class Task:
    """One question; ``expected`` are the strings that an answer must hold, ``max_tokens`` bounds the answer."""

    task: str
    prompt: list[int]
    expected: list[str]
    max_tokens: int

    def right(self, answer: str) -> float:
        """Share of the expected strings in an answer, without case; what follows a question of its own is ignored."""
        said = answer.partition("Question:")[0].lower()
        return sum(string.lower() in said for string in self.expected) / len(self.expected)

    def same(self, full: str, other: str) -> bool:
        """Whether an answer is that of full attention, letter by letter.

        Where full attention is right, up to the last expected string: what a model writes on after it has answered
        parts at the first near-tie. Else all of it.
        """
        found = [re.search(re.escape(string), full, re.IGNORECASE) for string in self.expected]
        if self.right(full) < 1:
            return other == full
        return other.startswith(full[: max(match.end() for match in found if match)])


@dataclass(frozen=True)
class Passage:
    """A stretch of the text: token ids of a prompt and those that follow it."""

    prompt: list[int]
    tokens: list[int]


def _filler(encode: Encode, text: str, tokens: int, rng: random.Random) -> list[int]:
    """``tokens`` ids of the text from a random word on; a text that is too short is repeated."""
    if not text.strip():
        raise ValueError("retrieval: the text is empty; name another with --text")
    at = rng.randrange(max(1, len(text) - 8 * tokens))  # so far from its end that most texts need no repetition
    at = text.find(" ", at) if at else 0
    at = max(at, 0)
    ids: list[int] = []
    while len(ids) < tokens:
        piece = text[at : at + 4 * (tokens - len(ids)) + 64]
        ids += encode(piece)
        at = (at + len(piece)) % len(text)
    return ids[:tokens]


def _document(
    encode: Encode,
    text: str,
    length: int,
    rng: random.Random,
    intro: str,
    facts: list[tuple[float, str]],
    question: str,
    max_tokens: int,
) -> list[int]:
    """Intro, text with each fact at its depth (0 to 1), question: ``length - max_tokens`` tokens."""
    begin, end = encode(intro), encode(question)
    planted = [(depth, encode(f"\n\n{fact}\n\n")) for depth, fact in sorted(facts, key=lambda fact: fact[0])]
    room = length - max_tokens - len(begin) - len(end) - sum(len(ids) for _, ids in planted)
    if room < 0:
        raise ValueError(f"retrieval: {length} tokens are too few for this task; it needs at least {length - room}")
    filler = _filler(encode, text, room, rng)
    prompt, at = begin, 0
    for depth, ids in planted:
        cut = int(depth * room)
        prompt = prompt + filler[at:cut] + ids
        at = cut
    return prompt + filler[at:] + end


def _rng(task: str, length: int, seed: int, number: int) -> random.Random:
    return random.Random(f"{task} {length} {seed} {number}")


def _keys(rng: random.Random, count: int) -> list[str]:
    return rng.sample([f"{first}-{second}" for first in _FIRST for second in _SECOND], count)


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _fact(key: str, number: str) -> str:
    return f"The special magic number for {key} is: {number}."


def _ask(key: str) -> str:
    return f"\n\nQuestion: What is the special magic number for {key}?\nAnswer:"


def planted(encode: Encode, text: str, length: int, count: int, seed: int) -> list[Task]:
    """One planted number a document, at even depths over the ``count`` documents."""
    tasks = []
    for i in range(count):
        rng = _rng("planted", length, seed, i)
        (key,), (number,) = _keys(rng, 1), _numbers(rng, 1)
        facts = [((i + 0.5) / count, _fact(key, number))]
        prompt = _document(encode, text, length, rng, _INTRO, facts, _ask(key), 32)
        tasks.append(Task("planted", prompt, [number], 32))
    return tasks


def multikey(encode: Encode, text: str, length: int, count: int, seed: int) -> list[Task]:
    """Several keys a document, each with its number; one of them is asked for, at even depths."""
    return _many_keys("multikey", _KEYS, encode, text, length, count, seed)


def crowd(encode: Encode, text: str, length: int, count: int, seed: int) -> list[Task]:
    """As multikey, among a hundred keys of one form."""
    return _many_keys("crowd", _CROWD, encode, text, length, count, seed)


def _many_keys(name: str, many: int, encode: Encode, text: str, length: int, count: int, seed: int) -> list[Task]:
    tasks = []
    for i in range(count):
        rng = _rng(name, length, seed, i)
        keys, numbers = _keys(rng, many), _numbers(rng, many)
        depths = [(i + 0.5) / count, *(rng.random() for _ in keys[1:])]
        facts = [(d, _fact(key, number)) for d, key, number in zip(depths, keys, numbers, strict=True)]
        prompt = _document(encode, text, length, rng, _INTRO, facts, _ask(keys[0]), 32)
        tasks.append(Task(name, prompt, [numbers[0]], 32))
    return tasks


def multivalue(encode: Encode, text: str, length: int, count: int, seed: int) -> list[Task]:
    """One key with several numbers at random depths; all are asked for."""
    tasks = []
    for i in range(count):
        rng = _rng("multivalue", length, seed, i)
        (key,), numbers = _keys(rng, 1), _numbers(rng, _VALUES)
        facts = [(rng.random(), _fact(key, number)) for number in numbers]
        question = (
            f"\n\nQuestion: What are all the special magic numbers for {key}?\n"
            f"Answer: The special magic numbers for {key} are:"
        )
        prompt = _document(encode, text, length, rng, _INTRO, facts, question, 64)
        tasks.append(Task("multivalue", prompt, numbers, 64))
    return tasks


def variables(encode: Encode, text: str, length: int, count: int, seed: int) -> list[Task]:
    """A chain of assignments at random depths; all variables of one value are asked for."""
    intro = (
        "Track the variable assignments hidden in the following text. Example: after VAR QWERT = 11111 and "
        "VAR ASDFG = VAR QWERT the variables that are assigned the value 11111 are: QWERT ASDFG.\n\n"
    )
    tasks = []
    for i in range(count):
        rng = _rng("variables", length, seed, i)
        names = _words(rng, _HOPS + 1, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", 5)
        value = str(rng.randrange(20_000, 100_000))
        depths = sorted(rng.random() for _ in names)
        sources = [value, *(f"VAR {name}" for name in names)]
        facts = [(d, f"VAR {name} = {source}") for d, name, source in zip(depths, names, sources, strict=False)]
        question = (
            f"\n\nQuestion: Which variables are assigned the value {value} in the text above?\n"
            f"Answer: The variables that are assigned the value {value} are:"
        )
        prompt = _document(encode, text, length, rng, intro, facts, question, 48)
        tasks.append(Task("variables", prompt, names, 48))
    return tasks


def _words(rng: random.Random, count: int, letters: str, size: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(letters, k=size))] = None
    return list(found)


def frequent(encode: Encode, text: str, length: int, count: int, seed: int) -> list[Task]:
    """A document of coded words with frequencies by Zipf's law; the three most frequent are asked for.

    ``text`` is not used: in natural text the most frequent words are known without reading it.
    """
    begin = encode("Read the following coded text and track the frequency of each coded word.\n\n")
    end = encode(
        "\n\nQuestion: What are the three most frequently appearing words in the coded text above?\n"
        "Answer: The three most frequently appearing words are:"
    )
    tasks = []
    for i in range(count):
        rng = _rng("frequent", length, seed, i)
        room = length - 48 - len(begin) - len(end)
        words = _words(rng, 3 * _RANKS, "abcdefghijklmnopqrstuvwxyz", 6)
        pieces = [encode(f" {word}") for word in words[:_RANKS]]
        weights = [(rank + 1) ** -_ZIPF for rank in range(_RANKS)]
        scale = room / sum(weight * len(piece) for weight, piece in zip(weights, pieces, strict=True))
        counts = [int(scale * weight) for weight in weights]
        if room <= 0 or counts[2] <= max(counts[3], 1):
            raise ValueError(f"retrieval: {length} tokens are too few for the task frequent; ask at 512 or more")
        coded = [piece for piece, times in zip(pieces, counts, strict=True) for _ in range(times)]
        room -= sum(len(piece) for piece in coded)
        for word in words[_RANKS:]:  # what is left of the room holds words that occur once
            piece = encode(f" {word}")
            if len(piece) > room:
                break
            coded.append(piece)
            room -= len(piece)
        rng.shuffle(coded)
        prompt = begin + [token for piece in coded for token in piece] + end
        tasks.append(Task("frequent", prompt, words[:3], 48))
    return tasks


def passages(encode: Encode, text: str, length: int, count: int, seed: int, score_tokens: int) -> list[Passage]:
    """Stretches of ``length`` tokens of the text, for perplexity.

    ``score_tokens + 1`` tokens follow the prompt: the first of them is predicted by the prompt's own pass.
    """
    if length < score_tokens + 2:
        raise ValueError(f"retrieval: {length} tokens are too few to score {score_tokens} of them")
    cut = length - score_tokens - 1
    found = [_filler(encode, text, length, _rng("prose", length, seed, i)) for i in range(count)]
    return [Passage(ids[:cut], ids[cut:]) for ids in found]


GENERATORS: dict[str, Callable[[Encode, str, int, int, int], list[Task]]] = {
    "planted": planted,
    "multikey": multikey,
    "crowd": crowd,
    "multivalue": multivalue,
    "variables": variables,
    "frequent": frequent,
}
PROSE = "prose"
TASKS = (*GENERATORS, PROSE)
