"""Every knob of the plugin, with its unit, its default and why; and what vLLM's config makes of it."""

import os
from pathlib import Path
from typing import Any, Literal, Self

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_retrieval_attn import ownership

KEY = "retrieval"
"""Key of our knobs in ``--additional-config`` and of the resolved ones in the connector's config."""

GB = 10**9

COMPARED = ("ivf", "hnsw", "roar")
"""Kinds of index that are served to be compared with: for their answers, not for speed (workers/library.py)."""
COMPARED_BUDGET = 0.1
"""Share of keys that those score unless told otherwise."""


class RetrievalConfig(BaseModel):
    """Knobs under ``--additional-config '{"retrieval": {...}}'``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sink_tokens: int = Field(128, ge=0)
    """First tokens of a request that stay in the paged cache (attention sinks); the paper's 128.
    Rounded up to whole blocks."""
    window_tokens: int = Field(512, ge=1)
    """Most recent tokens that stay in the paged cache; the paper's 512."""
    index: Literal["attention", "flat", "none", "ivf", "hnsw", "roar"] = "attention"
    """``attention``: sealed segments are searched through clusters and 4-bit codes, see docs/index.md. ``flat``: exact
    search over every host token, equal to full attention up to rounding. ``none``: nothing is kept on the host,
    attention sees sink and window alone (a lower bound to compare with). ``ivf``, ``hnsw``, ``roar``: other indexes to
    compare answers with, slow, their memory comes beside ``host_memory_gb``."""
    budget: float | None = Field(None, gt=0, le=1)
    """Share of the indexed keys that a decode step scans; 1: exact attention over all keys. Default: calibrated for
    each KV head when a segment is sealed; with ``ivf``, ``hnsw`` and ``roar`` 0.1."""
    rerank: int = Field(800, ge=1, le=1 << 20)
    """Indexed keys that a decode step attends to exactly, for each KV head."""
    tail: bool = True
    """Whether to estimate the share of the keys that are not attended to exactly."""
    build_on: Literal["cpu", "gpu"] | None = None
    """Where index ``attention`` is built: by the CPU workers in the background, or on the GPU beside the model, which
    takes up to half of the memory that vLLM leaves free there. Default: on the GPU where there is one."""
    fidelity: float = Field(0.002, ge=0, le=1)
    """Share of decode steps that CPU workers compare with exact search afterwards, at low priority; 0: none."""
    segment_tokens: int = Field(8192, ge=64)
    """Tokens of a segment, the unit that an index covers. A multiple of 64; of 256 and below 65,536 with index
    ``attention``."""
    host_memory_gb: float | None = Field(None, gt=0)
    """Host memory for K and V, in 10^9 bytes, for the whole engine. Default: what is free at start,
    less a reserve for the rest of the machine."""
    workers: int | None = Field(None, ge=1)
    """Ray actors for each tensor-parallel rank; at most one for a KV head. Default: 1."""
    threads: int | None = Field(None, ge=1)
    """Search threads in each actor. Default: the cores, less one a rank, shared by all actors."""
    ray_address: str | None = None
    """A running Ray cluster on this host. Default: a local Ray of our own that ends with the engine."""
    worker_timeout_s: float = Field(60.0, gt=0)
    """A living worker that has not answered for so long is taken for hung and replaced."""
    restart_timeout_s: float = Field(30.0, gt=0)
    """How long dead workers may take to come back before the requests that need them fail."""
    poison_freed: bool = False
    """Overwrite freed host pages and freed paged blocks with NaN. For tests: slow."""

    @field_validator("segment_tokens")
    @classmethod
    def _whole_tiles(cls, value: int) -> int:
        if value % 64:
            raise ValueError(f"must be a multiple of 64, not {value}")
        return value

    @model_validator(mode="after")
    def _whole_nodes(self) -> Self:
        if self.index == "attention" and (self.segment_tokens % 256 or self.segment_tokens >= 1 << 16):
            raise ValueError(
                f"segment_tokens={self.segment_tokens}: index 'attention' needs a multiple of 256 below 65536"
            )
        return self

    @model_validator(mode="after")
    def _one_thread(self) -> Self:
        if self.index in COMPARED and self.threads not in (None, 1):
            raise ValueError(f"threads={self.threads}: index {self.index!r} has one thread a worker; raise workers")
        return self

    @property
    def page_tokens(self) -> int:
        """Tokens of an arena page: small enough that a short request takes little, and a divisor of a segment."""
        size = 1024
        while self.segment_tokens % size:
            size //= 2
        return size


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
    index_slabs: int = 0
    """Segments of one rank that may be indexed."""
    block_size: int
    """Tokens of a paged block."""
    ranks: int
    """Tensor-parallel ranks that share the machine."""
    cpus: list[int]
    """CPUs that the engine was started on."""

    @property
    def sink_end(self) -> int:
        return ownership.sink_end(self.sink_tokens, self.block_size)

    @property
    def host_tokens(self) -> int:
        """Host tokens that the arena of one rank holds."""
        return self.host_pages * self.page_tokens

    @property
    def longest_request(self) -> int | None:
        """Most tokens (prompt and output) that one request can ever hold; None: no limit of ours."""
        if self.index == "none":
            return None
        return max(self.sink_end + self.host_tokens, self.sink_end + self.window_tokens)

    @property
    def spin_ns(self) -> int:
        """How long lanes yield before they sleep: little on a small machine, where they would starve the model."""
        return 1_000_000 if len(self.cpus) > 4 else 50_000


def one_line(error: ValidationError) -> str:
    """A pydantic error as one line that names each knob."""
    parts = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"]) or KEY
        if problem["type"] == "extra_forbidden":
            known = ", ".join(sorted(RetrievalConfig.model_fields))
            parts.append(f"unknown knob {name!r} (known: {known})")
        elif not problem["loc"]:
            parts.append(problem["msg"].removeprefix("Value error, "))
        else:
            parts.append(f"{name}={problem['input']!r}: {problem['msg']}")
    return "; ".join(parts)


def parse(additional_config: Any) -> RetrievalConfig:
    """The knobs from vLLM's ``additional_config``.

    Raises:
        ValueError: one line that says what to change.
    """
    knobs = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(knobs, dict):
        raise ValueError(f'retrieval: additional_config["{KEY}"] must be a JSON object, not {knobs!r}')
    try:
        return RetrievalConfig.model_validate(knobs)
    except ValidationError as error:
        raise ValueError(f"retrieval: {one_line(error)}") from None


def available_memory() -> int:
    """Bytes of RAM that this process group may still take, with the cgroup's limit."""
    free = psutil.virtual_memory().available
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = Path("/sys/fs/cgroup", limit_file).read_text().strip()
            used = Path("/sys/fs/cgroup", used_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            free = min(free, int(limit) - int(used))
    return max(0, free)


def default_host_memory_gb(spoken_for: int = 0) -> float:
    """Host memory to take: what is free, less ``spoken_for`` bytes, less 10 % of it and at least 4 GB."""
    free = available_memory() - spoken_for
    return max(0.0, (free - max(4 * GB, free // 10)) / GB)


def default_threads(cpus: int, ranks: int, workers: int) -> int:
    """Search threads of one actor: the cores, less one a rank for vLLM, shared by all actors."""
    return max(1, (cpus - ranks) // (ranks * workers))


def resolve(
    config: RetrievalConfig,
    *,
    bytes_per_token: int,
    kv_heads: int,
    block_size: int,
    ranks: int,
    index_bytes_per_segment: int = 0,
    spoken_for: int = 0,
) -> ResolvedConfig:
    """Fill the defaults in from model and machine.

    Args:
        bytes_per_token: K and V of one token in one rank's retrieval layers.
        kv_heads: KV heads of one rank. ranks: tensor-parallel size.
        index_bytes_per_segment: index of one segment in one rank's retrieval layers; part of host_memory_gb.
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
    elif config.index != "none" and host_memory_gb * GB > free:
        raise ValueError(
            f"retrieval: host_memory_gb={host_memory_gb:g} is more than the {free / GB:.1f} GB that are free; "
            "lower host_memory_gb or free memory on the host"
        )
    page_bytes = bytes_per_token * config.page_tokens
    with_index = page_bytes + index_bytes_per_segment * config.page_tokens / config.segment_tokens
    pages = 0 if config.index == "none" else int(host_memory_gb * GB / ranks / with_index)
    if config.index != "none" and pages < 1:
        raise ValueError(
            f"retrieval: host_memory_gb={host_memory_gb:.2f} holds no page of {config.page_tokens} tokens "
            f"({page_bytes * ranks / GB:.3f} GB); raise host_memory_gb, or lower segment_tokens for smaller pages"
        )
    return ResolvedConfig(
        **{**config.model_dump(), "host_memory_gb": max(host_memory_gb, 1e-9)}
        | {
            "workers": workers,
            "threads": 1 if config.index in COMPARED else config.threads or default_threads(len(cpus), ranks, workers),
            "bytes_per_token": bytes_per_token,
            "host_pages": pages,
            "index_slabs": pages * config.page_tokens // config.segment_tokens if index_bytes_per_segment else 0,
            "block_size": block_size,
            "ranks": ranks,
            "cpus": cpus,
        }
    )
