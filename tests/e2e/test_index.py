# SPDX-License-Identifier: Apache-2.0
"""The default index, live in the engine: the demo's questions, exact on request, a dead worker, a space learned."""

import pytest

from tests.engines import EngineRun


def engine_runs(folder):
    out = folder / "index.json"
    return {"index": EngineRun(220, out, "tests.e2e.index_engine", (str(out),))}


@pytest.fixture(scope="module")
def found(engine_run):
    return engine_run("index")


def test_the_demos_questions_are_answered_through_the_index(found):
    assert found["right"] == [True, True]


def test_the_same_request_gives_the_same_tokens(found):
    assert found["again"]


def test_a_request_may_ask_for_exact_attention(found):
    assert found["exact_right"] == [True, True]


def test_a_worker_that_dies_changes_no_answer(found):
    assert found["restarted"]
    assert found["restarts"] == 1  # the one that was killed, and none of itself


def test_aborted_requests_disturb_nobody(found):
    assert found["disturbed"] == [True]


def test_the_models_space_is_learned_from_the_first_long_prompt_and_kept(found):
    assert found["space"] == "rotation"
    assert found["space_after"] == "learned"
    assert len(found["learned"]) == 1
    assert found["right_after"]


def test_nothing_is_left(found):
    assert found["left"] == {"host_bytes": 0, "index_bytes": 0, "requests": 0}


def test_sampled_steps_are_compared_with_exact_attention(found):
    assert list(found["fidelity"]) == ["layers 0-7", "layers 8-15", "layers 16-22", "layers 23-29"]
    for figures in found["fidelity"].values():
        assert 0.3 < figures["recall"] <= 1  # most keys here weigh less than tau
        assert 0.4 < figures["mass"] <= 1
        assert 0 < figures["output_error"] < 0.05
        assert abs(figures["lse_bias"]) < 0.005
