# SPDX-License-Identifier: Apache-2.0
"""Every knob of the plugin, with its unit, its default and why; and what vLLM's config makes of it."""

import os
import reprlib
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_retrieval_attn.core.limits import available_cpus, available_memory
from vllm_retrieval_attn.core.ownership import Split, cdiv

KEY = "retrieval"
"""Key of our knobs in ``--additional-config`` and of the resolved ones in the connector's config."""

GB = 10**9
MOST_ROWS = 1 << 16
MOST_RESIDENT = 1 << 21
"""Paged tables have a place for each block of such a request."""
MOST_THREADS = 1024

REPLACED = {
    "budget": "rows",
    "restart_timeout_s": "answer_timeout_s",
    "rerank": "rows",
    "tail": "rows",
    "segment_tokens": "page_tokens",
    "build_on": "threads",
}
"""Knobs of earlier versions, and the one that does their work now."""


MOST_SINKS = 64
"""Prompts whose sinks are kept at most."""


class RetrievalConfig(BaseModel):
    """Knobs under ``--additional-config '{"retrieval": {...}}'``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    sink_tokens: int = Field(128, ge=0, le=MOST_RESIDENT)
    """First tokens of a request that stay in the paged cache (attention sinks); the paper's 128.
    Rounded up to whole blocks."""
    window_tokens: int = Field(512, ge=1, le=MOST_RESIDENT)
    """Most recent tokens that stay in the paged cache; the paper's 512."""
    resident_tokens: int = Field(4096, ge=0, le=MOST_RESIDENT)
    """A request of up to so many tokens stays wholly in the paged cache and is exact."""
    index: Literal["attention", "flat", "none"] = "attention"
    """``attention``: rows are sampled by 4-bit codes, see docs/index-study.md. ``flat``: exact attention
    over every host token, equal to full attention up to rounding. ``none``: nothing is kept on the host, attention sees
    sinks and window alone (a lower bound to compare with)."""
    rows: int = Field(1024, ge=1, le=MOST_ROWS)
    """Host rows that a decode step reads for each KV head, on average and at most."""
    tau: float = Field(0.001, gt=0, le=1)
    """Share of the attention, summed over the query heads of a KV head, from which on a key is always read. Keys below
    are read with a probability of their share / tau; tau is raised where more than ``rows`` would be read."""
    candidates: int = Field(4096, ge=64, le=1 << 16)
    """About how many keys a search by CPU workers returns for each query head and step; the others count as one
    class."""
    scan: Literal["auto", "faiss"] = "auto"
    """What scores codes on the CPU. ``faiss``: Faiss's search. ``auto``: where the processor has AVX-512 VNNI, a loop
    for it over the same codes, with which a search takes less than half of the time; Faiss's search elsewhere."""
    max_rows: int = Field(4096, ge=1, le=MOST_ROWS)
    """Most ``retrieval_rows`` that a request may ask for."""
    min_tau: float = Field(1e-5, gt=0, le=1)
    """Least ``retrieval_tau`` that a request may ask for."""
    allow_exact: bool = True
    """Whether a request may ask for exact attention over all its host tokens (``retrieval_exact``)."""
    fidelity: float = Field(0.002, ge=0, le=1)
    """Share of decode steps that CPU workers compare with exact search afterwards, at low priority; 0: none."""
    page_tokens: int = Field(1024, ge=64, le=1 << 16)
    """Tokens of an arena page, the unit of host memory; a power of two."""
    host_memory_gb: float | None = Field(None, gt=0)
    """Host memory for K, V and their codes, in 10^9 bytes, for the whole engine. Default: what is free at start,
    less a reserve for the rest of the machine."""
    sketch_gb: float | None = Field(None, ge=0)
    """GPU memory of each rank for 4-bit codes of all host keys, in 10^9 bytes; what they hold is chosen and read by the
    GPU in a CUDA graph, other requests are searched by the CPU workers. Default: what ``host_memory_gb`` needs, at most
    0.4 of what the weights leave; 0: none. On a GPU alone."""
    workers: int | None = Field(None, ge=1)
    """Ray actors for each tensor-parallel rank; at most one for a KV head. Default: 1."""
    threads: int | None = Field(None, ge=1, le=MOST_THREADS)
    """Search threads in each actor. Default: see default_threads."""
    ray_address: str | None = None
    """A running Ray cluster on this host, host:port or auto. Default: a local Ray of our own that ends with the
    engine."""
    answer_timeout_s: float = Field(2.0, ge=0.01, le=3600)
    """How long a step waits for the workers' answer before the engine attends to the rows itself, all of them."""
    worker_timeout_s: float = Field(60.0, ge=1, le=86_400)
    """A living worker that has not answered for so long is taken for hung and replaced."""
    poison_freed: bool = False
    """Overwrite freed host pages and freed paged blocks with NaN. For tests: slow."""

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """1e4 is a float in JSON. Nothing else is taken for what it is not: true would be one row."""
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("page_tokens")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"must be a power of two, not {value}")
        return value

    @field_validator("ray_address")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None and value != "auto" and ray_port(value) is None:
            raise ValueError("must be host:port of a running Ray, or auto; leave it out for a local Ray")
        return value

    @model_validator(mode="after")
    def _within_limits(self) -> Self:
        if self.rows > self.max_rows:
            raise ValueError(f"rows={self.rows} is above max_rows={self.max_rows}; raise max_rows or lower rows")
        if self.tau < self.min_tau:
            raise ValueError(f"tau={self.tau:g} is below min_tau={self.min_tau:g}; lower min_tau or raise tau")
        return self


class ResolvedConfig(RetrievalConfig):
    """The knobs with every default filled in, plus what was read off model and machine.

    Travels to every process in ``kv_transfer_config.kv_connector_extra_config["retrieval"]``.
    """

    host_memory_gb: float = Field(gt=0)
    workers: int = Field(ge=1)
    threads: int = Field(ge=1)
    bytes_per_token: int
    """Bytes of K and V of one token in the retrieval layers of one rank."""
    host_pages: int
    """Arena pages of one rank; 0 with index ``none``."""
    index_bytes_per_token: int = 0
    """Bytes of codes of one token in the retrieval layers of one rank; 0 unless the index is ``attention``."""
    block_size: int
    """Tokens of a paged block."""
    ranks: int
    """Tensor-parallel ranks that share the machine."""
    layers: int = 0
    """Retrieval layers of one rank."""
    cpus: list[int]
    """CPUs that the engine was started on."""

    @property
    def sketches(self) -> bool:
        """Whether there is to be a sketch on the GPU."""
        return self.sketch_gb != 0

    @property
    def hosted(self) -> bool:
        """Whether there is host memory at all. A decode step may be one graph on a GPU then."""
        return self.index != "none"

    @property
    def split(self) -> Split:
        return Split(self.sink_tokens, self.window_tokens, self.resident_tokens, self.block_size)

    @property
    def sink_end(self) -> int:
        return self.split.sink_end

    @property
    def sink_slots(self) -> int:
        """Prompts whose sinks are kept on the host for others that begin alike; 0 where nothing can be reused: pages
        are no whole blocks, or so few that those for the sinks would be more than a twentieth of them."""
        slots = min(MOST_SINKS, max(4, self.host_pages // 8))
        few = 20 * cdiv(slots * self.sink_end, self.page_tokens) > self.host_pages
        return 0 if few or not self.host_pages or self.page_tokens % self.block_size else slots

    @property
    def arena_pages(self) -> int:
        """Pages of host tokens, then pages with the sinks of ``sink_slots`` prompts."""
        return self.host_pages + cdiv(self.sink_slots * self.sink_end, self.page_tokens)

    @property
    def host_tokens(self) -> int:
        """Host tokens that the arena of one rank holds."""
        return self.host_pages * self.page_tokens

    @property
    def longest_request(self) -> int | None:
        """Most tokens (prompt and output) that one request can ever hold; None: no limit of ours."""
        if self.index == "none":
            return None
        return max(self.sink_end + self.host_tokens, self.sink_end + self.window_tokens, self.resident_tokens)

    @property
    def spin_ns(self) -> int:
        """How long lanes yield before they sleep: little on a small machine, where they would starve the model."""
        return 1_000_000 if len(self.cpus) > 4 else 50_000


def ray_port(address: str) -> tuple[str, int] | None:
    """Host and port of ``host:port``; None where it is something else."""
    host, _, port = address.rpartition(":")
    known = host and not set(host) & set("/ ") and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16
    return (host.strip("[]"), int(port)) if known else None


def one_line(error: ValidationError) -> str:
    """A pydantic error as one line that names each knob."""
    parts = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden" and name in REPLACED:
            parts.append(f"knob {name!r} is no more; use {REPLACED[name]!r}")
        elif problem["type"] == "extra_forbidden":
            known = ", ".join(sorted(RetrievalConfig.model_fields))
            parts.append(f"unknown knob {name!r} (known: {known})")
        elif not problem["loc"]:
            parts.append(problem["msg"].removeprefix("Value error, "))
        else:  # a value may be of any length
            parts.append(f"{name}={reprlib.repr(problem['input'])}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)


def _refuse_misplaced(additional_config: dict[Any, Any]) -> None:
    """Knobs beside ``retrieval`` instead of in it would be passed over. What else is there may be other plugins'."""
    for name in additional_config:
        text = str(name)
        if text != KEY and text.strip().lower() == KEY:
            raise ValueError(f'retrieval: additional_config has {text!r}; write "{KEY}"')
        if text in RetrievalConfig.model_fields or text in REPLACED:
            raise ValueError(
                f'retrieval: the knob {text!r} lies beside "{KEY}" in additional_config; write '
                f'{{"{KEY}": {{"{text}": ...}}}}'
            )


def parse(additional_config: Any) -> RetrievalConfig:
    """The knobs from vLLM's ``additional_config``.

    Raises:
        ValueError: one line that says what to change.
    """
    if isinstance(additional_config, list | str | int | float):  # what JSON can be besides; a program may pass its own
        raise ValueError(
            f'retrieval: --additional-config must be a JSON object such as {{"{KEY}": {{...}}}}, not '
            f"{reprlib.repr(additional_config)}"
        )
    if isinstance(additional_config, dict):
        _refuse_misplaced(additional_config)
    knobs = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(knobs, dict):
        raise ValueError(f'retrieval: additional_config["{KEY}"] must be a JSON object, not {reprlib.repr(knobs)}')
    try:
        return RetrievalConfig.model_validate(knobs)
    except ValidationError as error:
        raise ValueError(f"retrieval: {one_line(error)}") from None


def default_host_memory_gb(spoken_for: int = 0) -> float:
    """Host memory to take: what is free, less ``spoken_for`` bytes, less 10 % of it and at least 4 GB."""
    free = available_memory() - spoken_for
    return max(0.0, (free - max(4 * GB, free // 10)) / GB)


MANY_CORES = 8


def default_threads(cpus: int, ranks: int, workers: int) -> int:
    """Search threads of one actor: the cores, less one a rank for vLLM, shared by all actors; of many, an actor's
    leader takes one, since it waits without sleeping."""
    share = (cpus - ranks) // (ranks * workers)
    return max(1, share - 1 if share >= MANY_CORES else share)


def resolve(
    config: RetrievalConfig,
    *,
    bytes_per_token: int,
    kv_heads: int,
    block_size: int,
    ranks: int,
    layers: int = 0,
    index_bytes_per_token: int = 0,
    spoken_for: int = 0,
) -> ResolvedConfig:
    """Fill the defaults in from model and machine.

    Args:
        bytes_per_token: K and V of one token in one rank's retrieval layers.
        kv_heads: KV heads of one rank. ranks: tensor-parallel size. layers: retrieval layers.
        index_bytes_per_token: codes of one token in one rank's retrieval layers; part of host_memory_gb.
        spoken_for: host bytes that vLLM itself is about to take (its KV cache on CPU).

    Raises:
        ValueError: one line that says what to change.
    """
    cpus = sorted(os.sched_getaffinity(0))
    workers = config.workers or 1
    if workers > kv_heads:
        raise ValueError(
            f"retrieval: workers={workers} is more than the {kv_heads} KV heads of a rank; "
            f"set workers to at most {kv_heads}"
        )
    host_memory_gb = config.host_memory_gb
    free = available_memory() - spoken_for
    if host_memory_gb is None:
        host_memory_gb = default_host_memory_gb(spoken_for)
        if config.index != "none" and not host_memory_gb:
            raise ValueError(
                f"retrieval: {max(0, free) / GB:.1f} GB of memory are free, and host_memory_gb leaves 4 GB by default; "
                "free memory on the host, raise the container's limit, or set host_memory_gb"
            )
    elif config.index != "none" and host_memory_gb * GB > free:
        raise ValueError(
            f"retrieval: host_memory_gb={host_memory_gb:g} is more than the {free / GB:.1f} GB that are free; "
            "lower host_memory_gb or free memory on the host"
        )
    page_bytes = (bytes_per_token + index_bytes_per_token) * config.page_tokens
    pages = 0 if config.index == "none" else int(host_memory_gb * GB / ranks / page_bytes)
    if config.index != "none" and pages < 1:
        raise ValueError(
            f"retrieval: host_memory_gb={host_memory_gb:.2f} holds no page of {config.page_tokens} tokens "
            f"({page_bytes * ranks / GB:.3f} GB); raise host_memory_gb, or lower page_tokens"
        )
    return ResolvedConfig(
        **{**config.model_dump(), "host_memory_gb": max(host_memory_gb, 1e-9)}
        | {
            "workers": workers,
            "threads": config.threads or default_threads(available_cpus(), ranks, workers),
            "bytes_per_token": bytes_per_token,
            "host_pages": pages,
            "index_bytes_per_token": index_bytes_per_token,
            "block_size": block_size,
            "ranks": ranks,
            "layers": layers,
            "cpus": cpus,
        }
    )
