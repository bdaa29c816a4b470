# SPDX-License-Identifier: Apache-2.0
"""The routes under /retrieval that tell something."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from vllm_retrieval_attn.plugin.live_defaults import live_defaults
from vllm_retrieval_attn.plugin.resolved import resolved_config
from vllm_retrieval_attn.serving import models, state
from vllm_retrieval_attn.serving.drain import RETRY_AFTER_S, Drain
from vllm_retrieval_attn.serving.events import Events, TooMany
from vllm_retrieval_attn.serving.keys import VIEW, requires

PAGE = Path(__file__).with_name("page.html")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
"""The page loads nothing from anywhere, and asks its own server only."""


def router(drain: Drain, view_key: str | None) -> APIRouter:
    """``app.state.engine_client`` is vLLM's."""
    made, events = APIRouter(prefix="/retrieval", tags=["retrieval"]), Events(drain)
    viewing = [Depends(requires(VIEW, view_key))]
    page = PAGE.read_text()

    @made.get("/ready", responses={503: {"model": models.Ready}})
    def ready(request: Request, response: Response) -> models.Ready:
        """For probes; needs no key."""
        reason = _unready(drain, request.app.state.engine_client)
        if reason is not None:
            response.status_code = 503
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
        return models.Ready(ready=reason is None, reason=reason)

    @made.get("/", response_class=HTMLResponse)
    def show() -> HTMLResponse:
        """The page; it asks for the view key, and holds no data itself."""
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache", "X-Frame-Options": "DENY"}
        return HTMLResponse(page, headers=headers)

    @made.get("/status", dependencies=viewing)
    def status(request: Request) -> models.Status:
        """Everything at once."""
        return state.status(request.app.state.engine_client, drain)

    @made.get("/config", dependencies=viewing)
    def config(request: Request) -> models.Config:
        """The knobs, with all defaults filled in and what was changed since the start."""
        knobs = resolved_config(request.app.state.engine_client.vllm_config).model_dump()
        return knobs | live_defaults.changed()

    @made.get("/workers", dependencies=viewing)
    def workers() -> dict[int, models.EngineWorkers]:
        """CPU workers by engine."""
        return state.workers()

    @made.get("/fidelity", dependencies=viewing)
    def fidelity() -> dict[int, list[models.Fidelity]]:
        """How close to exact attention it stays, by engine."""
        return {one.engine: one.fidelity for one in state.engines()}

    @made.get("/requests", dependencies=viewing)
    def requests() -> models.Requests:
        """Those that live, and the last thousand that ended."""
        return state.requests()

    @made.get("/events", dependencies=viewing, responses={200: {"content": {"text/event-stream": {}}}})
    async def stream(request: Request) -> Any:
        """Server-sent events: ``status`` every second, ``request`` when one has ended."""
        client = request.app.state.engine_client
        try:
            text = events.listen(lambda: state.status(client, drain))
        except TooMany:
            raise HTTPException(503, "retrieval: too many listen to events; close some") from None
        return StreamingResponse(text, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    return made


def _unready(drain: Drain, client: Any) -> str | None:
    if drain.active:
        return "draining"
    if client.errored:
        return "the engine has failed; its log says why"
    return None
