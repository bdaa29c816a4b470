"""The routes under /retrieval. What they tell comes from the stats that engines send with their steps, so that no route
waits for a step."""

import time
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response

from vllm_retrieval_attn import __version__
from vllm_retrieval_attn.plugin.resolved import resolved_config
from vllm_retrieval_attn.plugin.stats import Told, key, told
from vllm_retrieval_attn.serving.drain import RETRY_AFTER_S, Drain
from vllm_retrieval_attn.serving.keys import ADMIN, VIEW, requires
from vllm_retrieval_attn.serving.models import Config, Draining, Engine, Fidelity, Ready, Status, Use, Workers

PATHS = ("sketch", "faiss", "exact", "degraded", "none")
FIGURES = ("recall", "mass", "output_error", "lse_bias")


def router(drain: Drain, view_key: str | None, admin_key: str | None) -> APIRouter:
    """All routes; ``app.state.engine_client`` is vLLM's."""
    made = APIRouter(prefix="/retrieval", tags=["retrieval"])
    viewing, changing = Depends(requires(VIEW, view_key)), Depends(requires(ADMIN, admin_key))

    @made.get("/ready", responses={503: {"model": Ready}})
    def ready(request: Request, response: Response) -> Ready:
        """For probes; needs no key."""
        reason = _unready(drain, request.app.state.engine_client)
        if reason is not None:
            response.status_code = 503
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
        return Ready(ready=reason is None, reason=reason)

    @made.get("/status", dependencies=[viewing])
    def status(request: Request) -> Status:
        """Everything at once."""
        client = request.app.state.engine_client
        return Status(
            model=client.vllm_config.model_config.served_model_name or client.vllm_config.model_config.model,
            version=__version__, draining=drain.active, running=running(client), engines=engines(),
        )  # fmt: skip

    @made.get("/config", dependencies=[viewing])
    def config(request: Request) -> Config:
        """The knobs, with all defaults filled in."""
        return resolved_config(request.app.state.engine_client.vllm_config).model_dump()

    @made.get("/workers", dependencies=[viewing])
    def workers() -> dict[int, Workers]:
        """CPU workers by engine."""
        return {one.engine: one.workers for one in engines()}

    @made.get("/fidelity", dependencies=[viewing])
    def fidelity() -> dict[int, list[Fidelity]]:
        """How close to exact attention it stays, by engine."""
        return {one.engine: one.fidelity for one in engines()}

    @made.post("/drain", dependencies=[changing])
    def begin(request: Request) -> Draining:
        """Answer new requests with 503; running ones finish."""
        drain.asked = True
        return Draining(draining=drain.active, running=running(request.app.state.engine_client))

    @made.post("/undrain", dependencies=[changing])
    def end(request: Request) -> Draining:
        """Take new requests again."""
        if drain.ending:
            raise HTTPException(409, "retrieval: the server is shutting down; start a new one")
        drain.asked = False
        return Draining(draining=drain.active, running=running(request.app.state.engine_client))

    return made


def _unready(drain: Drain, client: Any) -> str | None:
    if drain.active:
        return "draining"
    if client.errored:
        return "the engine has failed; its log says why"
    return None


def running(client: Any) -> int:
    """Requests of this API server that are under way."""
    return int(client.output_processor.get_num_unfinished_requests())


def engines() -> list[Engine]:
    """Every engine that has told something."""
    return [_engine(number, one) for number, one in sorted(told.items())]


def _engine(number: int, one: Told) -> Engine:
    now, total = one.now, one.total
    taken = now.get("sample_timestamp_seconds")
    groups = sorted({name.partition("|")[2] for name in now if name.startswith("recall|")}, key=_first_layer)
    sketch = key("sketch_bytes", "capacity")
    return Engine(
        engine=number,
        healthy=bool(now.get("healthy", 0)),
        sample_age_s=None if taken is None else round(time.time() - taken, 3),
        workers=Workers(
            wanted=int(now.get(key("workers", "wanted"), 0)),
            alive=int(now.get(key("workers", "alive"), 0)),
            restarts=int(total.get("worker_restarts", 0)),
            given_up=bool(now.get("workers_given_up", 0)),
        ),
        arena=Use(used=now.get(key("arena_bytes", "used"), 0), capacity=now.get(key("arena_bytes", "capacity"), 0)),
        sketch=Use(used=now[key("sketch_bytes", "used")], capacity=now[sketch]) if sketch in now else None,
        host_tokens=int(now.get("host_tokens", 0)),
        host_requests=int(now.get("host_requests", 0)),
        prefix_bytes=now.get("prefix_bytes", 0),
        steps={path: int(total.get(key("steps", path), 0)) for path in PATHS},
        rows_read=int(total.get("rows_read", 0)),
        requests_failed=int(total.get("requests_failed", 0)),
        fidelity=[Fidelity(layers=group, **{name: now[key(name, group)] for name in FIGURES}) for group in groups],
    )


def _first_layer(group: str) -> int:
    return int(group.partition("-")[0])
