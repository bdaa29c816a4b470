# SPDX-License-Identifier: Apache-2.0
"""The routes under /retrieval that change something. Each wants the admin key."""

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request

from vllm_retrieval_attn.plugin.live_defaults import live_defaults
from vllm_retrieval_attn.plugin.resolved import EXTENSION, resolved_config
from vllm_retrieval_attn.serving import models
from vllm_retrieval_attn.serving.drain import Drain
from vllm_retrieval_attn.serving.keys import ADMIN, requires
from vllm_retrieval_attn.serving.state import running

WORKER_TIMEOUT_S = 120.0
"""A worker hears between two steps, and a step of a long prefill takes seconds."""


def control_router(drain: Drain, admin_key: str | None) -> APIRouter:
    """``app.state.engine_client`` is vLLM's."""
    changing = [Depends(requires(ADMIN, admin_key)), Depends(_only_server)]
    made = APIRouter(prefix="/retrieval", tags=["retrieval"], dependencies=changing)

    @made.post("/drain")
    def begin(request: Request) -> models.Draining:
        """Answer new requests with 503; running ones finish."""
        drain.asked = True
        return models.Draining(draining=drain.active, running=running(request.app.state.engine_client))

    @made.post("/undrain")
    def end(request: Request) -> models.Draining:
        """Take new requests again."""
        if drain.ending:
            raise HTTPException(409, "retrieval: the server is shutting down; start a new one")
        drain.asked = False
        return models.Draining(draining=drain.active, running=running(request.app.state.engine_client))

    @made.patch("/config")
    async def change(wanted: models.Change, request: Request) -> models.Changed:
        """Change knobs while the server runs; all or none of them."""
        client = request.app.state.engine_client
        config = resolved_config(client.vllm_config)
        old = {name: float(getattr(config, name)) for name in models.Change.model_fields} | live_defaults.changed()
        try:
            live_defaults.check(config, wanted.rows, wanted.tau)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        if wanted.fidelity is not None:
            if config.index != "attention":
                raise HTTPException(
                    422, f"retrieval: fidelity has no meaning with index={config.index!r}; leave it out"
                )
            await _workers_do(client, "retrieval_fidelity", wanted.fidelity)
        live_defaults.take(wanted.rows, wanted.tau, wanted.fidelity)
        return models.Changed(old=old, new=old | live_defaults.changed())

    @made.post("/workers/{rank}/{number}/restart")
    async def restart(rank: int, number: int, request: Request) -> models.Restarted:
        """End a CPU worker and start another in its place; requests go on."""
        answers = await _workers_do(request.app.state.engine_client, "retrieval_restart", rank, number)
        found = [answer for answer in answers if answer is not None]
        if not found:
            raise HTTPException(404, f"retrieval: there is no CPU worker {number} of rank {rank}")
        if not found[0]:
            raise HTTPException(409, f"retrieval: CPU worker {number} of rank {rank} is not alive; it is being started")
        return models.Restarted(rank=rank, number=number)

    @made.post("/requests/{name}/abort")
    async def abort(name: str, request: Request) -> models.Aborted:
        """End a request; ``name`` is its id in ``requests``, or the one that its client knows."""
        client = request.app.state.engine_client
        known = client.output_processor
        if name in known.request_states:
            await client.abort(name, internal=True)
        elif name in known.external_req_ids:
            await client.abort(name)
        else:
            raise HTTPException(404, f"retrieval: no request {name!r} is under way")
        return models.Aborted(id=name)

    return made


def _only_server(request: Request) -> None:
    """A request to change reaches one of several API servers, whichever; the others would not know."""
    servers = getattr(request.app.state.engine_client.vllm_config.parallel_config, "_api_process_count", 1)
    if servers > 1:
        raise HTTPException(
            409,
            f"retrieval: this server has {servers} API servers, and only one would hear of it; start it with "
            "--api-server-count 1 (to drain, send SIGTERM)",
        )


async def _workers_do(client: Any, method: str, *args: Any) -> list[Any]:
    """Call a method of plugin/control.py in every rank."""
    extension = client.vllm_config.parallel_config.worker_extension_cls
    if extension != EXTENSION:
        raise HTTPException(
            409, f"retrieval: workers can not be told, as they have --worker-extension-cls {extension}; leave that out"
        )
    try:
        answers: list[Any] = await asyncio.wait_for(client.collective_rpc(method, args=args), WORKER_TIMEOUT_S)
    except TimeoutError:
        raise HTTPException(504, "retrieval: the engine does not answer; a long step may be under way") from None
    return answers
