# SPDX-License-Identifier: Apache-2.0
"""Whether a step may be replayed as one CUDA graph, and as which; asked before vLLM decides how to run it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vllm_retrieval_attn.core.options import SearchOptions
from vllm_retrieval_attn.core.ownership import Split

if TYPE_CHECKING:
    from vllm_retrieval_attn.plugin.messages import StepMessage
    from vllm_retrieval_attn.store.arena import Arena


def needs_workers(
    message: "StepMessage",
    scheduled: Mapping[str, int],
    arena: "Arena",
    options: Callable[[str], SearchOptions],
) -> bool:
    """Whether some request of a step has work for the CPU workers: it asks for exact attention, has no codes on the
    GPU, or may lose them in this step.

    Args:
        message: of the step. scheduled: its new tokens by request. options: how to search for a request, unless the
            message tells anew.
    """
    wanted = 0
    if any(opening.match.tokens for opening in message.opened.values()):
        return True  # a part of a prompt: no decode step
    for request_id, epoch in message.admitted.items():
        store = arena.requests.get(request_id)
        if store is not None and store.epoch != epoch:
            store = None  # admitted anew: it begins with codes
        if (message.options.get(request_id) or options(request_id)).exact or (store and not store.sketched):
            return True
        tokens, held = (store.tokens, len(store.codes)) if store is not None else (0, 0)
        wanted += max(0, arena.layout.page_tokens_owned(tokens + scheduled.get(request_id, 0)) - held)
    return wanted > 0 and wanted > arena.spare_codes()  # which looks at all kept pages: seldom


def may_attend(message: "StepMessage", arena: "Arena", split: Split) -> bool:
    """Whether some request of a decode step may attend to host tokens: by what is written of it, which is never less
    than what is computed.

    Args:
        message: of the step. split: where tokens are divided.
    """
    for request_id, epoch in message.admitted.items():
        store = arena.requests.get(request_id)
        if store is None or store.epoch != epoch:
            if arena.filled:  # counts as written from its first step on
                return True
        elif split.window_start(split.sink_end + store.tokens) > split.sink_end:
            return True
    return False
