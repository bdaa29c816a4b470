# SPDX-License-Identifier: Apache-2.0
"""Refusing at arrival what host memory could never hold."""

import logging
from typing import TYPE_CHECKING, Any

from vllm_retrieval_attn.core.options import search_options
from vllm_retrieval_attn.plugin.live_defaults import live_defaults
from vllm_retrieval_attn.plugin.prometheus import count

if TYPE_CHECKING:
    from vllm_retrieval_attn.core.config import ResolvedConfig

logger = logging.getLogger("vllm.retrieval.requests")


def check_request(config: "ResolvedConfig", request: Any) -> None:
    """Refuse a prompt that does not fit the host arena; end generation where the arena ends.

    A prompt that fits with its requested output cut short is served and finishes with reason
    "length", as one that meets max_model_len does.

    Raises:
        VLLMValidationError: the prompt alone is too long, or an argument of the request is wrong; the API server
            answers 400 with this text.
    """
    from vllm.exceptions import VLLMValidationError

    longest = config.longest_request
    params = request.sampling_params
    if params is None:
        return
    try:
        search_options(config, params.extra_args)
    except ValueError as error:
        count("requests_refused", "arguments")
        raise VLLMValidationError(str(error)) from None
    params.extra_args = live_defaults.fill(params.extra_args)
    if longest is None:
        return
    prompt = len(request.prompt_token_ids or ()) or len(request.prompt_embeds)
    if prompt >= longest:
        count("requests_refused", "host_memory")
        raise VLLMValidationError(
            f"retrieval: the prompt has {prompt} tokens, but host memory holds at most {longest - 1} prompt tokens "
            f"for one request (host_memory_gb={config.host_memory_gb:.1f}); shorten the prompt or raise host_memory_gb"
        )
    if prompt + params.max_tokens > longest:
        count("requests_cut")
        logger.warning(
            "retrieval: max_tokens %d cut to %d, where host memory ends", params.max_tokens, longest - prompt
        )
        params.max_tokens = longest - prompt
