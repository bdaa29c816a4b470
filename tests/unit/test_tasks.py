# SPDX-License-Identifier: Apache-2.0
"""Generated questions: the same for the same seed, as long as asked, with their answers in the prompt."""

import re

import pytest

from vllm_retrieval_attn.evaluation.tasks import GENERATORS, Task, passages

TEXT = "".join(f"Line {number} of a text that means little, with commas and a number.\n" for number in range(400))


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def short(name: str) -> int:
    """A length that is just enough for a task."""
    return 6500 if name == "crowd" else 1500


def make(name: str, length: int | None = None, count: int = 3, seed: int = 0, text: str = TEXT) -> list[Task]:
    return GENERATORS[name](encode, text, length or 2 * short(name), count, seed)


each_task = pytest.mark.parametrize("name", list(GENERATORS))


@each_task
def test_the_seed_decides(name):
    assert make(name) == make(name)
    assert make(name) != make(name, seed=1)
    prompts = [tuple(task.prompt) for task in make(name)]
    assert len(set(prompts)) == len(prompts)


@each_task
def test_the_prompt_holds_what_is_expected(name):
    for task in make(name):
        text = decode(task.prompt)
        assert task.expected
        assert all(string in text for string in task.expected)
        assert "\n\nQuestion: " in text
        assert "\nAnswer:" in text


@each_task
@pytest.mark.parametrize("times", [1, 2, 13])
def test_prompt_and_answer_fill_the_length(name, times):
    length = times * short(name)
    for task in make(name, length):
        assert length - 10 < len(task.prompt) + task.max_tokens <= length


@each_task
def test_a_length_that_is_too_short_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"^retrieval: 150 tokens are too few") as caught:
        make(name, 150)
    assert "\n" not in str(caught.value)


@each_task
def test_a_short_text_is_repeated_and_an_empty_one_refused(name):
    assert len(make(name, text="A word. ")[0].prompt) > 2 * short(name) - 200
    if name != "frequent":
        with pytest.raises(ValueError, match="text is empty"):
            make(name, text=" \n")


@each_task
def test_right_takes_the_expected_and_nothing_else(name):
    (task,) = make(name, count=1)
    assert task.right(f" They are {', '.join(task.expected)}.") == 1
    assert task.right(" ".join(task.expected).upper()) == 1
    assert task.right(" I do not know: 1234567, qwerty.") == 0
    assert task.right(f" none\nQuestion: what of {' '.join(task.expected)}?") == 0
    assert task.right(task.expected[0]) == 1 / len(task.expected)


def test_planted_numbers_stand_at_even_depths():
    depths = [
        decode(task.prompt).index(f": {task.expected[0]}.") / len(task.prompt) for task in make("planted", 20_000, 4)
    ]
    assert depths == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8], abs=0.02)


@pytest.mark.parametrize(("name", "keys"), [("multikey", 4), ("crowd", 100)])
def test_only_one_of_several_keys_is_asked_for(name, keys):
    (task,) = make(name, count=1)
    text = decode(task.prompt)
    key = text.rpartition("number for ")[2].partition("?")[0]
    facts = re.findall(r"The special magic number for (\S+) is: (\d+)\.", text)
    assert len(set(dict(facts))) == len({number for _, number in facts}) == keys
    assert f"The special magic number for {key} is: {task.expected[0]}." in text


def test_variables_form_a_chain_in_order():
    (task,) = make("variables", count=1)
    text = decode(task.prompt).partition("\n\n")[2]
    value = text.rpartition("the value ")[2].partition(" ")[0]
    facts = [f"VAR {task.expected[0]} = {value}"]
    facts += [f"VAR {b} = VAR {a}" for a, b in zip(task.expected, task.expected[1:], strict=False)]
    places = [text.index(fact) for fact in facts]
    assert len(facts) == 5
    assert places == sorted(places)


def test_frequent_words_are_the_most_frequent():
    (task,) = make("frequent", count=1)
    words = decode(task.prompt).partition("\n\n")[2].partition("\n\n")[0].split()
    by_count = sorted(set(words), key=words.count, reverse=True)
    assert by_count[:3] == task.expected
    assert words.count(by_count[2]) > words.count(by_count[3])


def test_passages_are_consecutive_text():
    for part in passages(encode, TEXT, 1000, 2, 0, score_tokens=48):
        assert len(part.tokens) == 49
        assert len(part.prompt) == 1000 - 49
        assert decode(part.prompt + part.tokens) in TEXT
    assert passages(encode, TEXT, 1000, 2, 0, 48) != passages(encode, TEXT, 1000, 2, 1, 48)
    with pytest.raises(ValueError, match="too few to score 48"):
        passages(encode, TEXT, 49, 1, 0, 48)


def test_an_answer_is_compared_with_full_attentions_up_to_its_end():
    task = Task("multivalue", [1], ["123", "Abc"], 9)
    full = " They are abc and 123.\n\nMore text"
    assert task.same(full, " They are abc and 123, or so")
    assert not task.same(full, " They are 123 and abc.\n\nMore text")
    assert not task.same(full, " They are abc and 12")
    wrong = " They are abc.\n\nMore text"
    assert task.same(wrong, wrong)
    assert not task.same(wrong, wrong + "s")
