# SPDX-License-Identifier: Apache-2.0
"""Models with AWQ weights: the answers are those of full attention with the same weights."""

import pytest

from tests.engines import EngineRun


def engine_runs(folder):
    out = folder / "quantized.json"
    return {"quantized": EngineRun(30, out, "tests.e2e.quantized", (str(out),))}


@pytest.fixture(scope="module")
def found(engine_run):
    return engine_run("quantized")


def test_answers_are_those_of_full_attention(found):
    assert found["kinds"] == ["AutoAWQMarlinLinearMethod"]
    assert found["apart"] == [False, False]
    assert found["words"] > 10
    assert found["host"][1] > 4000
