# SPDX-License-Identifier: Apache-2.0
"""The lanes' board: memory of the host that GPU and lanes both see (decode_lanes.cuh, which has the same numbers)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.core.limits import MOST_LANES
from vllm_retrieval_attn.device.decode_step import Geometry

MOST_HANDED, POSTED = 1024, 512
"""Runs that lanes are handed of a layer; rows of a message."""
LINE = 64
LAYER, HANDED = 0, 1
"""int64 numbers of the board's first line."""
COUNT, PLACE, HOMES = 1, 2, 3
"""int64 numbers of a message, after that of the layer."""
DONE = LINE
MESSAGES = DONE + MOST_LANES * LINE


def _in_lines(size: int) -> int:
    return -(-size // LINE) * LINE


class Places(NamedTuple):
    """Offsets and sizes in bytes; log_pi, tokens and queries are within a message.

    Attributes:
        group, dim: of the model. home_limit: elements of the arena, less those of a page.
    """

    group: int
    dim: int
    home_limit: int
    message: int
    queries: int
    log_pi: int
    tokens: int
    parts: int
    part: int


class Board(NamedTuple):
    """The same bytes as int64, uint16 and float32."""

    words: npt.NDArray[np.int64]
    halves: npt.NDArray[np.uint16]
    floats: npt.NDArray[np.float32]


@dataclass(frozen=True)
class BoardLayout:
    """Where things lie on the board of a geometry."""

    geometry: Geometry

    @property
    def places(self) -> Places:
        g = self.geometry
        log_pi = LINE + 2 * g.group * g.dim
        tokens = log_pi + 4 * POSTED
        message = _in_lines(tokens + 2 * POSTED)
        page = 1024 * 2 * g.dim
        return Places(
            g.group, g.dim, (g.layers * g.host_pages * g.kv_heads - 1) * page, message, LINE, log_pi, tokens,
            MESSAGES + MOST_HANDED * message, _in_lines(4 * g.group * (g.dim + 2)),
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        places = self.places
        return places.parts + MOST_HANDED * places.part


def board_of(memory: npt.NDArray[Any]) -> Board:
    """Views of a board's bytes, uint8 and contiguous."""
    return Board(memory.view(np.int64), memory.view(np.uint16), memory.view(np.float32))
