# SPDX-License-Identifier: Apache-2.0
"""`make demo`, as it is run: a server, two questions, the right answers."""

import pytest

from tests.engines import EngineRun


def engine_runs(folder):
    out = folder / "demo.json"
    return {"demo": EngineRun(100, out, "vllm_retrieval_attn.demo", ("--json", str(out)))}


@pytest.fixture(scope="module")
def found(engine_run):
    return engine_run("demo")


def test_every_fact_is_found_though_most_tokens_are_on_the_host(found):
    assert [row["right"] for row in found] == [True] * 2
    for row in found:
        assert row["paged_tokens"] < 800 < 2000 < row["host_tokens"]
        assert row["rows_read"] < row["host_tokens"] / 2
