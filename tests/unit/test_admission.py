# SPDX-License-Identifier: Apache-2.0
"""What host memory could never hold, and wrong arguments of a request, are refused at arrival."""

import json
from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from vllm_retrieval_attn.core.config import RetrievalConfig
from vllm_retrieval_attn.core.options import NAMES, SearchOptions, search_options
from vllm_retrieval_attn.plugin.admission import check_request

KNOBS = RetrievalConfig(host_memory_gb=1, rows=800, tau=0.01, max_rows=2000, min_tau=1e-4)
CONFIG = SimpleNamespace(**KNOBS.model_dump(), longest_request=1000)


def request(prompt: int, max_tokens: int = 10, embeds: bool = False, extra_args=None):
    return SimpleNamespace(
        prompt_token_ids=None if embeds else [0] * prompt,
        prompt_embeds=[0] * prompt if embeds else None,
        sampling_params=SimpleNamespace(max_tokens=max_tokens, extra_args=extra_args),
    )


@pytest.mark.parametrize("prompt", [1000, 1001, 5000])
def test_a_prompt_that_does_not_fit_is_refused_in_one_line(prompt):
    with pytest.raises(
        VLLMValidationError, match=rf"^retrieval: the prompt has {prompt} tokens.*host_memory_gb"
    ) as caught:
        check_request(CONFIG, request(prompt))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize(
    ("prompt", "asked", "given"), [(999, 10, 1), (990, 11, 10), (990, 10, 10), (10, 10, 10), (1, 2000, 999)]
)
def test_output_ends_where_host_memory_ends(prompt, asked, given, embeds):
    arriving = request(prompt, asked, embeds)
    check_request(CONFIG, arriving)
    assert arriving.sampling_params.max_tokens == given


def test_a_refused_prompt_given_as_embeddings_is_counted():
    with pytest.raises(VLLMValidationError, match="1000 tokens"):
        check_request(CONFIG, request(1000, embeds=True))


def test_without_a_limit_nothing_is_refused_or_cut():
    arriving = request(5000, 5000)
    check_request(SimpleNamespace(**{**vars(CONFIG), "longest_request": None}), arriving)
    assert arriving.sampling_params.max_tokens == 5000


def test_a_pooling_request_passes():
    arriving = request(5000)
    arriving.sampling_params = None
    check_request(CONFIG, arriving)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"retrieval_rows": 0}, "retrieval_rows=0 must be"),
        ({"retrieval_rows": 2001}, "retrieval_rows=2001 .*max_rows=2000"),
        ({"retrieval_rows": 1.5}, "retrieval_rows=1.5"),
        ({"retrieval_rows": "many"}, "retrieval_rows='many'"),
        ({"retrieval_rows": True}, "retrieval_rows=True"),
        ({"retrieval_rows": None}, "retrieval_rows=None"),
        ({"retrieval_tau": 0}, "retrieval_tau=0 must be"),
        ({"retrieval_tau": 9e-5}, "retrieval_tau=9e-05 .*min_tau=0.0001"),
        ({"retrieval_tau": 1.01}, "retrieval_tau=1.01"),
        ({"retrieval_tau": "0.1"}, "retrieval_tau='0.1'"),
        ({"retrieval_tau": [0.1]}, r"retrieval_tau=\[0.1\]"),
        ({"retrieval_exact": 3}, "retrieval_exact=3"),
        ({"retrieval_exact": "true"}, "retrieval_exact='true'"),
        ({"retrieval_probes": 3}, "unknown request argument 'retrieval_probes'; known are retrieval_rows"),
        ({"retrieval": {"rows": 5}}, "unknown request argument 'retrieval'; known are retrieval_rows"),
        ({"retrieval-rows": 5}, "unknown request argument 'retrieval-rows'; known are retrieval_rows"),
        ({"Retrieval_Rows": 5}, "unknown request argument 'Retrieval_Rows'; known are retrieval_rows"),
        ({"retrieval_budget": 0.5}, "'retrieval_budget' is no more; use 'retrieval_rows'"),
        ({"retrieval_rerank": 64}, "'retrieval_rerank' is no more; use 'retrieval_rows'"),
        ({"retrieval_tail": 0}, "'retrieval_tail' is no more; use 'retrieval_rows'"),
    ],
)
def test_a_wrong_argument_of_a_request_is_refused_in_one_line(extra, message):
    with pytest.raises(VLLMValidationError, match=message) as caught:
        check_request(CONFIG, request(10, extra_args=extra))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "1" + 400 * "0", "-1" + 400 * "0"])
def test_numbers_beyond_all_bounds_are_refused_as_wrong_values(name, number):
    with pytest.raises(ValueError, match=rf"^retrieval: {name}=") as caught:
        search_options(KNOBS, {name: json.loads(number)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", ["flat", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_arguments_without_an_index_to_search_are_refused(index, name):
    config = SimpleNamespace(**{**vars(CONFIG), "index": index})
    with pytest.raises(VLLMValidationError, match=f"{name} has no meaning with index='{index}'"):
        check_request(config, request(10, extra_args={name: 1}))


def test_exact_attention_can_be_forbidden():
    config = SimpleNamespace(**{**vars(CONFIG), "allow_exact": False})
    with pytest.raises(VLLMValidationError, match="retrieval_exact is not allowed"):
        check_request(config, request(10, extra_args={"retrieval_exact": True}))
    check_request(config, request(10, extra_args={"retrieval_exact": False}))


def test_options_are_the_knobs_and_what_a_request_overrides():
    assert search_options(CONFIG, {"kv_transfer_params": {}}) == SearchOptions(800, 0.01, False, 0)
    assert search_options(CONFIG, None, 5) == SearchOptions(800, 0.01, False, 5)
    given = {"retrieval_rows": 2000.0, "retrieval_tau": 1, "retrieval_exact": 1}
    options = search_options(CONFIG, given, -3)
    assert options == SearchOptions(2000, 1.0, True, -3)
    assert [type(value) for value in vars(options).values()] == [int, float, bool, int]
    assert search_options(CONFIG, {"retrieval_rows": 1, "retrieval_tau": 1e-4}) == SearchOptions(1, 1e-4, False, 0)
