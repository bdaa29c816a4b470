# SPDX-License-Identifier: Apache-2.0
"""Two ranks: answers are those of one, and of full attention; a rank whose CPU worker dies attends itself."""

import os

import pytest

from tests.engines import EngineRun


def engine_runs(folder):
    if len(os.sched_getaffinity(0)) < 2:
        return {}
    out = folder / "tensor-parallel.json"
    return {"tensor parallel": EngineRun(15, out, "tests.e2e.tensor_parallel", (str(out),), cores=2)}


pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks want two cores")


@pytest.fixture(scope="module")
def found(engine_run):
    return engine_run("tensor parallel")


def test_each_rank_has_workers_of_its_own(found):
    assert found["workers"] == 2


def test_all_rows_read_give_full_attention(found):
    assert found["apart"] == [False, False]
    assert found["by"] < 1e-4


def test_a_killed_worker_of_one_rank_changes_no_answer(found):
    assert found["killed"]


def test_two_ranks_draw_the_rows_that_one_draws(found):
    """KV heads are numbered in the whole model. Sums differ in their last bits, so now and then a row does."""
    assert found["rows"][0] == found["rows"][1]
    for steps in found["sampled"]:
        assert sum(step < 1e-3 for step in steps) >= 0.6 * len(steps), steps
    assert found["sampled_off"] > 0.05  # rows are sampled, and the draw can be seen
