# SPDX-License-Identifier: Apache-2.0
"""What the routes take and answer."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


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


class Worker(BaseModel):
    """One CPU worker."""

    rank: int
    number: int
    pid: int
    state: Literal["alive", "silent", "absent"]


class EngineWorkers(Workers):
    """CPU workers of one engine, one by one."""

    restarts_by_reason: dict[str, int]
    each: list[Worker]


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
    paged_tokens: int
    host_requests: int
    prefix_bytes: float
    prefix_hit_tokens: int
    steps: dict[str, int] = Field(description="By path.")
    rows_read: int
    searches: int = Field(description="In how many steps of a request, layer and KV head these rows were read.")
    codes_scored: int
    layer_seconds: dict[str, float] = Field(description="A layer of a decode step by part, newest sample.")
    requests_failed: int
    requests_refused: dict[str, int] = Field(description="By reason, since the start of this API server.")
    compared_steps: int
    fidelity: list[Fidelity]


class Problem(BaseModel):
    """Something that is not as it should be, and what to do."""

    what: str
    do: str


class Status(BaseModel):
    """The whole server."""

    model: str
    version: str
    draining: bool
    running: int = Field(description="Requests that this API server has not answered yet.")
    problems: list[Problem]
    engines: list[Engine] = Field(description="Empty until the first step.")


class Request(BaseModel):
    """A request that lives, or one that is over."""

    model_config = ConfigDict(extra="forbid")

    id: str
    engine: int
    state: str = Field(description="waiting, running, preempted, ...; how it ended, where it is over.")
    arrived: float = Field(description="Seconds since 1970.")
    seconds: float = Field(description="Since then, or until its end.")
    prompt_tokens: int
    output_tokens: int
    host_tokens: int
    paged_tokens: int
    cached_tokens: int = Field(description="Of its prompt, not computed again.")
    path: str | None = Field(None, description="How its host tokens were attended to; where it is over.")
    rows_read: int | None = Field(None, description="A step, layer and KV head; where it is over.")
    degraded_steps: int | None = Field(None, description="Where it is over.")


class Requests(BaseModel):
    """Those that live, and the last thousand that are over, newest first."""

    live: list[Request]
    ended: list[Request]


class Draining(BaseModel):
    """Answer to drain and undrain."""

    draining: bool
    running: int


class Restarted(BaseModel):
    """Answer to a restart."""

    rank: int
    number: int


class Aborted(BaseModel):
    """Answer to an abort."""

    id: str


class Change(BaseModel):
    """Knobs that may change while the server runs; those left out stay."""

    model_config = ConfigDict(extra="forbid", strict=True)  # true is no number of rows

    rows: int | None = Field(None, description="Of requests that arrive from now on and do not choose.")
    tau: float | None = Field(None, description="Likewise.")
    fidelity: float | None = Field(None, ge=0, le=1, description="Share of decode steps to compare, from now on.")


class Changed(BaseModel):
    """The knobs before and after."""

    old: dict[str, float]
    new: dict[str, float]


Config = dict[str, Any]
