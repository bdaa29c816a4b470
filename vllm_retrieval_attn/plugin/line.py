# SPDX-License-Identifier: Apache-2.0
"""Who of the requests that wait may be scheduled, as far as host memory goes.

vLLM stops looking at its waiting queue at the first request that gets no blocks. Host memory would make that wait
endless: it may be held by sessions whose client is silent, or be less than a request will ever want. So each request
is asked about before vLLM tries to allocate for it (plugin/compat.py), and passed over where its pages are not there.
"""

import logging
import sys
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_retrieval_attn.core.ledger import HostLedger

logger = logging.getLogger("vllm.retrieval.requests")


class Turn(Enum):
    """GO: its pages are there. WAIT: not yet. YIELD: not yet, and it gives up what it holds. NEVER: it can not fit."""

    GO = "go"
    WAIT = "wait"
    YIELD = "yield"
    NEVER = "never"


class WaitingLine:
    """Decides in the order in which the scheduler asks.

    Requests that want no page always go. The others go first come, first served while requests that run can make the
    room for the first of them: smaller ones behind it would keep a large one out for ever. Where only the end of a
    session makes that room, nobody knows when, so those behind it pass.

    A session between two chunks keeps its pages, and vLLM preempts running requests only. Two of them that wait for
    each other's would do so for ever; so one whose room is held by others yields: its pages are freed and it is
    computed anew, as a preempted request is.

    Args:
        max_model_len: vLLM's limit, which it does not check for the chunks of a session. match: looks up what
            is kept of a request's prompt, so that the ledger asks for no more than the rest.
    """

    def __init__(self, ledger: "HostLedger", max_model_len: int, match: Callable[["Request"], object]) -> None:
        self._ledger, self._match = ledger, match
        self._max_model_len = max_model_len
        self._sessions: dict[str, Request] = {}
        self._told: set[str] = set()
        self._failed: set[str] = set()
        self._outgrew = 0
        self._saving = False

    def arrived(self, request: "Request") -> None:
        if request.resumable:
            self._sessions[request.request_id] = request

    def left(self, request_id: str) -> None:
        """The request is over."""
        self._sessions.pop(request_id, None)
        self._told.discard(request_id)
        self._failed.discard(request_id)

    def step_ends(self) -> None:
        """The scheduler has asked about all that it will ask about in this step."""
        self._saving = False

    def take_failed(self) -> set[str]:
        """Requests that can never fit, to be ended with an error; each is named once."""
        failed, self._failed = self._failed, set()
        return failed

    def take_outgrown(self) -> int:
        """How many were named since the last call."""
        count, self._outgrew = self._outgrew, 0
        return count

    def turn(self, request: "Request") -> Turn:
        """Whether a waiting request may be scheduled now. Cuts its ``max_tokens`` to where host memory ends."""
        ledger, name = self._ledger, request.request_id
        if self._outgrown(request):
            return Turn.NEVER
        self._match(request)
        more = ledger.required(name, request.num_tokens)
        if more == 0 or (more <= ledger.free_pages and not self._saving):
            return Turn.GO
        kept = self._kept_by_others(name)
        if ledger.held_pages(name) + more <= ledger.pages - kept:
            self._saving = True
            return Turn.WAIT
        gives_up = request.num_computed_tokens > 0
        if name not in self._told:
            self._told.add(name)
            logger.warning(
                "retrieval: request %s waits for host memory%s: sessions between two chunks hold %d of %d pages; "
                "end sessions or raise host_memory_gb",
                name,
                " and is computed anew then" if gives_up else "",
                kept,
                ledger.pages,
            )
        return Turn.YIELD if gives_up else Turn.WAIT

    def _kept_by_others(self, request_id: str) -> int:
        """Pages that come free at the will of a client only."""
        return sum(
            self._ledger.held_pages(name)
            for name, session in self._sessions.items()
            if name != request_id and session.status != RequestStatus.RUNNING
        )

    def _outgrown(self, request: "Request") -> bool:
        """Whether a request is longer than one can ever be; if not, it ends in time.

        Requests were cut at arrival (plugin/admission.py), but a session's chunks one by one.
        """
        limit = self._ledger.longest if self._ledger.needs_host(request.request_id) else sys.maxsize
        if request.resumable:
            limit = min(limit, self._max_model_len)
        if request.num_tokens >= limit:
            self._failed.add(request.request_id)
            self._outgrew += 1
            logger.error(
                "retrieval: request %s fails: it has %d tokens now, and one request can hold %d; "
                "start a new session, or raise %s",
                request.request_id,
                request.num_tokens,
                limit,
                "host_memory_gb" if limit == self._ledger.longest else "max_model_len",
            )
            return True
        most = limit - request.num_prompt_tokens
        if request.max_tokens > most:
            logger.warning("retrieval: max_tokens %d of %s cut to %d", request.max_tokens, request.request_id, most)
            request.max_tokens = most
        return False
