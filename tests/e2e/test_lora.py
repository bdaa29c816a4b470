# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: answers are full attention's, and what is kept of a prompt is its adapter's alone."""

import pytest

from tests.e2e.lora_engine import CALLS
from tests.engines import EngineRun


def engine_runs(folder):
    return {"lora": EngineRun(40, folder / "lora.json", "tests.e2e.lora_engine", (str(folder / "lora.json"),))}


@pytest.fixture(scope="module")
def found(engine_run):
    return engine_run("lora")


def test_each_adapters_answers_are_full_attentions(found):
    assert found["different"] == 3, "adapters that change nothing show nothing"
    assert found["apart"] == [False] * (len(CALLS) + 3)
    assert min(found["host"]) > 2000


def test_a_prefix_is_shared_with_the_same_adapter_and_with_no_other(found):
    cached = found["cached"]
    assert cached[0] == cached[1] == cached[3] == 0
    assert min(cached[2], cached[4], cached[5]) >= 2900
    assert not any(cached[len(CALLS) :])
