# SPDX-License-Identifier: Apache-2.0
"""Draining: requests that run finish, new ones are sent elsewhere.

vLLM itself answers new requests with status 200 and no text while it shuts down; the gate answers 503 instead.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_retrieval_attn.plugin.prometheus import count

RETRY_AFTER_S = 5
GUARDED = ("/v1/", "/v2/", "/inference/", "/cohere/", "/generate", "/pooling", "/classify", "/score", "/rerank")
"""Where requests for the model go; all others stay open while the server drains."""

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Drain:
    """Whether this API server takes new requests.

    Attributes:
        asked: somebody wants it drained. ending: it was told to end (SIGTERM), which nothing takes back.
    """

    def __init__(self) -> None:
        self.asked = self.ending = False

    @property
    def active(self) -> bool:
        return self.asked or self.ending

    def watch(self, engine_client: Any) -> None:
        """Hear of vLLM's shutdown: it stops its engine client first, and answers requests until that is done."""
        stop = engine_client.shutdown

        def stopping(*args: Any, **more: Any) -> Any:
            self.ending = True
            return stop(*args, **more)

        engine_client.shutdown = stopping


class DrainGate:
    """ASGI middleware: 503 with Retry-After for new requests while ``drain`` is active."""

    def __init__(self, app: Any, drain: Drain) -> None:
        self._app, self._drain = app, drain

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].startswith(GUARDED)
        if not (guarded and self._drain.active):
            await self._app(scope, receive, send)
            return
        count("requests_refused", "draining")
        message = "retrieval: this server is draining; send the request to another one, or later"
        body = json.dumps({"error": {"message": message, "type": "ServiceUnavailable", "code": 503}}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", str(RETRY_AFTER_S).encode()),
        ]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})
