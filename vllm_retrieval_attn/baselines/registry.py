# SPDX-License-Identifier: Apache-2.0
"""The kinds of index to compare with, by name."""

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.baselines.base import AttentionIndex
from vllm_retrieval_attn.baselines.flat import FlatIndex
from vllm_retrieval_attn.baselines.hnsw import HnswIndex
from vllm_retrieval_attn.baselines.ivf import IvfIndex
from vllm_retrieval_attn.baselines.roar import RoarIndex

KINDS: dict[str, type[AttentionIndex]] = {kind.kind: kind for kind in (FlatIndex, IvfIndex, HnswIndex, RoarIndex)}


def make_index(kind: str, scale: float, dim: int, dtype: npt.DTypeLike = np.float16) -> AttentionIndex:
    """An empty index of the ``kind`` named; the other arguments are those of :class:`AttentionIndex`."""
    if kind not in KINDS:
        raise ValueError(f"no index kind {kind!r}: there are {', '.join(KINDS)}")
    return KINDS[kind](scale, dim, dtype)
