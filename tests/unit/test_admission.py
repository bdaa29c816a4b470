"""What host memory could never hold is refused at arrival."""

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from vllm_retrieval_attn.admission import check_request
from vllm_retrieval_attn.options import SearchOptions, search_options

CONFIG = SimpleNamespace(
    longest_request=1000, host_memory_gb=1.0, index="attention", budget=None, rerank=800, tail=True
)


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
        ({"retrieval_budget": 2}, "retrieval_budget=2 must be"),
        ({"retrieval_budget": "much"}, "retrieval_budget='much'"),
        ({"retrieval_rerank": 0}, "retrieval_rerank=0"),
        ({"retrieval_rerank": 1.5}, "retrieval_rerank=1.5"),
        ({"retrieval_tail": 3}, "retrieval_tail=3"),
        ({"retrieval_probes": 3}, "unknown request argument 'retrieval_probes'; known are retrieval_budget"),
    ],
)
def test_a_wrong_argument_of_a_request_is_refused_in_one_line(extra, message):
    with pytest.raises(VLLMValidationError, match=message) as caught:
        check_request(CONFIG, request(10, extra_args=extra))
    assert "\n" not in str(caught.value)


def test_arguments_without_an_index_to_search_are_refused():
    config = SimpleNamespace(**{**vars(CONFIG), "index": "flat"})
    with pytest.raises(VLLMValidationError, match="no meaning with index='flat'"):
        check_request(config, request(10, extra_args={"retrieval_budget": 0.5}))


def test_options_are_the_knobs_and_what_a_request_overrides():
    assert search_options(CONFIG, {"kv_transfer_params": {}}) == SearchOptions(0.0, 800, True)
    given = {"retrieval_budget": 0.25, "retrieval_rerank": 64, "retrieval_tail": 0}
    assert search_options(CONFIG, given) == SearchOptions(0.25, 64, False)
