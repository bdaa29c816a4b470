"""What the routes answer."""

from typing import Any

from pydantic import BaseModel, Field


class Ready(BaseModel):
    """Whether new requests are welcome."""

    ready: bool
    reason: str | None = Field(None, description="Why not.")


class Workers(BaseModel):
    """CPU workers of one engine, all ranks together."""

    wanted: int
    alive: int
    restarts: int
    given_up: bool = Field(description="They died so often that they are not started again.")


class Use(BaseModel):
    """Bytes of a memory."""

    used: float
    capacity: float


class Fidelity(BaseModel):
    """Steps compared with exact attention, running means of a group of layers."""

    layers: str
    recall: float
    mass: float
    output_error: float
    lse_bias: float


class Engine(BaseModel):
    """One engine, as of its newest sample."""

    engine: int
    healthy: bool
    sample_age_s: float | None = Field(None, description="Seconds since the engine told; it tells with its steps.")
    workers: Workers
    arena: Use
    sketch: Use | None
    host_tokens: int
    host_requests: int
    prefix_bytes: float
    steps: dict[str, int] = Field(description="By path.")
    rows_read: int
    requests_failed: int
    fidelity: list[Fidelity]


class Status(BaseModel):
    """The whole server."""

    model: str
    version: str
    draining: bool
    running: int = Field(description="Requests that this API server has not answered yet.")
    engines: list[Engine] = Field(description="Empty until the first step.")


class Draining(BaseModel):
    """Answer to drain and undrain."""

    draining: bool
    running: int


Config = dict[str, Any]
