# SPDX-License-Identifier: Apache-2.0
"""4-bit codes of keys: a function of the key alone once the space is fixed.

A key's coordinates are rounded to 16 uniform levels, ``(code - 7.5) * step``, with a step of its own: 0.335 times its
root mean square, which is the best uniform quantizer of a normal distribution (Max, 1960).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.sketch.space import Floats, Space

STEP = 0.335
"""Distance of two levels in standard deviations."""
Codes = npt.NDArray[np.uint8]


def coordinates(keys: npt.NDArray[Any], space: Space) -> Floats:
    """(n, d) keys in the space of one head."""
    placed: Floats = (np.asarray(keys, np.float32) - space.mean).astype(np.float32) @ space.keys.T
    return placed


def levels(places: Floats, step: Any) -> Codes:
    """The codes 0 to 15 of coordinates (n, d); ``step`` broadcasts against them."""
    return np.clip(np.rint(places / step + np.float32(7.5)), 0, 15).astype(np.uint8)


def encode(keys: npt.NDArray[Any], space: Space) -> tuple[Codes, npt.NDArray[np.float16]]:
    """Code keys (n, d) in the space of one head.

    Returns:
        (n, d / 2) uint8: low nibbles carry the first half of the dimensions, high nibbles the second; and (n,) float16,
        the step of each key.
    """
    places = coordinates(keys, space)
    wanted = STEP * np.sqrt(np.square(places).mean(1))
    steps = np.maximum(wanted, 6e-8).astype(np.float16)  # a key that is the mean has a step, too
    codes = levels(places, steps.astype(np.float32)[:, None])
    half = codes.shape[1] // 2
    packed: Codes = codes[:, :half] | codes[:, half:] << np.uint8(4)
    return packed, steps


def score(queries: Floats, codes: Codes, steps: npt.NDArray[np.float16], space: Space, scale: float) -> Floats:
    """Estimated attention scores of coded keys.

    Args:
        queries: (g, d) of the query heads that share the KV head. codes, steps: as :func:`encode` gives them.
        scale: softmax scale.

    Returns:
        (g, n) float32, scaled.
    """
    turned = queries @ space.queries.T
    unpacked = np.concatenate((codes & 15, codes >> 4), axis=1).astype(np.float32) - np.float32(7.5)
    places = unpacked * steps.astype(np.float32)[:, None]
    found: Floats = (turned @ places.T + (queries @ space.mean)[:, None]) * np.float32(scale)
    return found
