"""What host memory could never hold is refused at arrival."""

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from vllm_retrieval_attn.admission import check_request

CONFIG = SimpleNamespace(longest_request=1000, host_memory_gb=1.0)


def request(prompt: int, max_tokens: int = 10, embeds: bool = False):
    return SimpleNamespace(
        prompt_token_ids=None if embeds else [0] * prompt,
        prompt_embeds=[0] * prompt if embeds else None,
        sampling_params=SimpleNamespace(max_tokens=max_tokens),
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
    check_request(SimpleNamespace(longest_request=None, host_memory_gb=1.0), arriving)
    assert arriving.sampling_params.max_tokens == 5000


def test_a_pooling_request_passes():
    arriving = request(5000)
    arriving.sampling_params = None
    check_request(CONFIG, arriving)
