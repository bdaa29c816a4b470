# SPDX-License-Identifier: Apache-2.0
"""What is kept of a prompt is reused, and answers stay what they are without."""

import pytest

from tests.engines import EngineRun

BLOCK, WINDOW = 16, 512


def engine_runs(folder):
    out = folder / "reuse.json"
    return {"reuse": EngineRun(240, out, "tests.e2e.reuse_engine", (str(out),))}


@pytest.fixture(scope="module")
def found(engine_run):
    return engine_run("reuse")


@pytest.mark.parametrize("case", ["second turn", "A-B-A", "at once", "exact", "short", "learned meanwhile", "reset"])
def test_answers_are_those_without_reuse(found, case):
    assert not any(found[case]["differ"])


def blocks(tokens):
    return tokens // BLOCK * BLOCK


def test_prompts_begin_where_they_part(found):
    (turn,) = found["second turn"]["cached"]
    assert turn == blocks(3000 + 16 - 1)
    assert found["A-B-A"]["cached"] == [2000, 0, blocks(2039)]
    assert sorted(found["at once"]["cached"]) == [0, *[blocks(2500)] * 3]
    assert found["exact"]["cached"] == [blocks(2539)]
    assert found["short"]["cached"] == [0, 0]  # what never leaves the GPU's pages is not kept on the host
    assert found["learned meanwhile"]["cached"] == [4000]
    assert found["reset"]["cached"] == [0]


def test_a_second_question_waits_for_little_more_than_itself(found):
    long = found["long"]
    assert long["prompt"] - long["cached"] <= 40 + BLOCK + WINDOW
    assert long["space"] == "learned"
    assert long["second_s"] <= 0.15 * long["first_s"]


def test_pages_are_kept_and_nobody_holds_them(found):
    left = found["left"]
    assert left["kept"] == left["idle"] > 10
    assert left["live"] == 0
