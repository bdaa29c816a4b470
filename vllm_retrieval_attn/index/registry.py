"""The kinds of index, by name."""

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.attention import ClusteredIndex
from vllm_retrieval_attn.index.base import AttentionIndex
from vllm_retrieval_attn.index.flat import FlatIndex
from vllm_retrieval_attn.index.hnsw import HnswIndex
from vllm_retrieval_attn.index.ivf import IvfIndex
from vllm_retrieval_attn.index.roar import RoarIndex

KINDS: dict[str, type[AttentionIndex]] = {
    kind.kind: kind for kind in (FlatIndex, IvfIndex, HnswIndex, RoarIndex, ClusteredIndex)
}


def make_index(kind: str, scale: float, dim: int, dtype: npt.DTypeLike = np.float16) -> AttentionIndex:
    """An empty index of the ``kind`` named; the other arguments are those of :class:`AttentionIndex`."""
    if kind not in KINDS:
        raise ValueError(f"no index kind {kind!r}: there are {', '.join(KINDS)}")
    return KINDS[kind](scale, dim, dtype)
