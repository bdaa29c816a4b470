# SPDX-License-Identifier: Apache-2.0
"""The stream of server-sent events: the status every second, and each request that ended since."""

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import islice

from pydantic import BaseModel

from vllm_retrieval_attn.plugin.stats import told
from vllm_retrieval_attn.serving.drain import Drain
from vllm_retrieval_attn.serving.models import Status
from vllm_retrieval_attn.serving.state import ended_request

EVERY_S = 1.0
MOST_LISTENERS = 32


class TooMany(Exception):
    """As many listen as may."""


class Events:
    """Streams of one API server. A stream ends with the server, which would wait for it otherwise."""

    def __init__(self, drain: Drain) -> None:
        self._drain, self._listeners = drain, 0

    def listen(self, status: Callable[[], Status]) -> AsyncIterator[str]:
        """A stream's text.

        Raises:
            TooMany: there are MOST_LISTENERS.
        """
        if self._listeners >= MOST_LISTENERS:
            raise TooMany
        self._listeners += 1
        return self._stream(status)

    async def _stream(self, status: Callable[[], Status]) -> AsyncIterator[str]:
        try:
            seen = {number: one.count for number, one in told.items()}
            while not self._drain.ending:
                yield _event("status", status())
                for number, one in told.items():
                    new = min(one.count - seen.get(number, 0), len(one.ended))
                    seen[number] = one.count
                    for row in islice(one.ended, len(one.ended) - new, None):
                        yield _event("request", ended_request(number, row))
                await asyncio.sleep(EVERY_S)
        finally:
            self._listeners -= 1


def _event(name: str, of: BaseModel) -> str:
    return f"event: {name}\ndata: {of.model_dump_json()}\n\n"
