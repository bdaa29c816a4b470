# SPDX-License-Identifier: Apache-2.0
"""An append-only Faiss index over at most SHARD_TOKENS keys of one KV head: 4-bit codes, scanned with SIMD.

Faiss's ``IndexIVFPQFastScan`` with a single list (the kind that answers range searches) and one dimension a
sub-quantizer, whose codebooks are set instead of trained: 16 uniform levels in coordinates that have about mean 0 and
deviation 1 (index/head.py). Measured against trained codebooks in docs/index-study.md. One more dimension is 1 for
every key: a query carries there what is to be subtracted from its scores, so that a search for scores above 0 has a
threshold of its own for every query. Keys are appended in whole blocks of BLOCK, already in Faiss's own layout
(index/packing.py): its ``add`` takes many times as long, nearly all of it for encoding.

All that scores above a threshold comes in no order, which takes Faiss half as long as the best k (docs/index-study.md).
"""

from functools import cache
from typing import Any

import faiss
import numpy as np

from vllm_retrieval_attn.index.native import object_address
from vllm_retrieval_attn.index.packing import BLOCK, SAMPLE, STEP, append, bytes_per_key
from vllm_retrieval_attn.sketch.space import Floats

SHARD_TOKENS = 8192
"""Keys of a shard, the unit that one thread searches: a multiple of a tile and of BLOCK."""
SAMPLES = SHARD_TOKENS // SAMPLE

_faiss: Any = faiss
LEVELS = ((np.arange(16) - 7.5) * STEP).astype(np.float32)


@cache
def _quantizer(dim: int) -> Any:
    """The one list's centre, shared by all shards."""
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(np.zeros((1, dim), np.float32))
    return quantizer


class Shard:
    """Codes of keys in the order they came. Searches may run side by side, but not beside :meth:`append`.

    Args:
        mean, deviation: (d,) float32; coordinates are shifted and scaled by them before they are coded.

    Attributes:
        size: keys. codes_address: of what Faiss scans, until the next :meth:`append`.
        samples: (d, SAMPLES) float32 coordinates, neither shifted nor scaled, of the keys
            ``SAMPLE / 2 + SAMPLE * j``.
    """

    def __init__(self, mean: Floats, deviation: Floats) -> None:
        self.mean, self.deviation = mean, deviation
        dim = self._dim = len(mean)
        self._index: Any = faiss.IndexIVFPQFastScan(
            _quantizer(dim + 1), dim + 1, 1, dim + 1, 4, faiss.METRIC_INNER_PRODUCT
        )
        self._index.by_residual = False
        levels = np.concatenate((np.tile(LEVELS, dim), np.ones(16, np.float32)))
        faiss.copy_array_to_vector(levels, self._index.pq.centroids)
        self._index.is_trained = True
        self._list: Any = _faiss.downcast_InvertedLists(self._index.invlists)
        self.size = self.codes_address = 0
        self.samples = np.zeros((dim, SAMPLES), np.float32)

    @property
    def address(self) -> int:
        """Of Faiss's object, see index/native.py."""
        return object_address(self._index)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.size * bytes_per_key(self._dim))

    def append(self, places: Floats) -> None:
        """Add keys, given by their coordinates (n, d); n is a multiple of BLOCK."""
        before, after = self.size, self.size + len(places)
        if len(places) % BLOCK or after > SHARD_TOKENS:
            raise ValueError(f"a shard takes whole blocks of {BLOCK} up to {SHARD_TOKENS} keys, not {after}")
        self._list.resize(0, after)  # Faiss rounds up to a power of two
        self._index.ntotal = self.size = after
        self.codes_address = int(self._list.get_codes(0))
        ids = int(self._list.get_ids(0))
        append(np.ascontiguousarray(places), self.mean, self.deviation, before, self.codes_address, ids, self.samples)
