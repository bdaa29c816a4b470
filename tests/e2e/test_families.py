# SPDX-License-Identifier: Apache-2.0
"""What people serve: with ``flat`` each family of models answers as with vLLM's own attention."""

from itertools import zip_longest

import pytest

from tests.e2e.families import BEYOND, FAMILIES, LENGTHS
from tests.engines import EngineRun

TOLERANCE, SEEN = 1e-4, 0.1
"""Most that rounding may change a log-probability by, and the least that lost tokens do: 1e-5 and 0.25 were seen."""


def engine_runs(folder):
    out = folder / "families.json"
    return {"families": EngineRun(70, out, "tests.e2e.families", (str(out),))}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, engine_run):
    return engine_run("families")[request.param]


def gap(mine, its, number):
    """Largest difference of a log-probability in one answer, up to where tokens part: then contexts differ, too.

    A token that only one names among its best has at most the last one's log-probability with the other.
    """
    largest = 0.0
    answers = (way[key][number] for way in (mine, its) for key in ("tokens", "logprobs"))
    for token, row, its_token, its_row in zip_longest(*answers):
        for one, other in ((row, its_row), (its_row, row)):
            least = min(other.values())
            largest = max(largest, *(abs(p - other[name]) if name in other else p - least for name, p in one.items()))
        if token != its_token:
            break
    return largest


def test_flat_equals_full_attention(family):
    full, flat = family["full"], family["flat"]
    assert flat["tokens"] == full["tokens"]
    assert max(gap(flat, full, number) for number in range(len(LENGTHS))) < TOLERANCE
    assert min(len(set(tokens)) for tokens in full["tokens"]) > 4, "tokens that repeat show little"


def test_the_host_had_tokens(family):
    none, some, most = family["flat"]["host_tokens"]
    assert none == 0 < some < 400
    assert most > 1000
    assert family["none"]["host_tokens"] == family["full"]["host_tokens"] == [0, 0, 0]


def test_without_the_host_long_answers_differ(family):
    short, *long = (gap(family["none"], family["full"], number) for number in range(len(LENGTHS)))
    assert short < TOLERANCE
    assert min(long) > SEEN


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [("llama 3.1", "llama3", "Llama3RotaryEmbedding"), ("yarn", "yarn", "YaRNScalingRotaryEmbedding")],
)
def test_positions_are_scaled(engine_run, name, kind, part):
    for way in engine_run("families")[name].values():
        assert way["positions"]["rope_type"] == kind
        assert way["positions"]["original_max_position_embeddings"] == BEYOND < max(LENGTHS)
        assert part in way["parts"]


def test_of_a_hybrid_model_only_global_layers_use_retrieval(engine_run):
    for name, ways in engine_run("families").items():
        sliding = 5 if name == "gemma 3" else 0
        layers = FAMILIES[name][1].get("num_hidden_layers", 2)
        assert sorted(ways["flat"]["backends"]) == ["CPU_ATTN"] * sliding + ["RETRIEVAL"] * (layers - sliding)
        assert set(ways["full"]["backends"]) == {"CPU_ATTN"}
