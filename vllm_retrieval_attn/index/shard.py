"""An append-only Faiss index over at most SHARD_TOKENS keys of one KV head: 4-bit codes, scanned with SIMD.

Faiss's ``IndexPQFastScan`` with one dimension a sub-quantizer, whose codebooks are set instead of trained: 16 uniform
levels in coordinates that have about mean 0 and deviation 1 (index/head.py). Measured against trained codebooks in
docs/index.md. Keys are appended in whole blocks of BLOCK, already in Faiss's own layout (index/packing.py): its ``add``
takes many times as long, nearly all of it for encoding.
"""

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.native import object_address
from vllm_retrieval_attn.index.packing import STEP, pack
from vllm_retrieval_attn.sketch.space import Floats

SHARD_TOKENS = 8192
"""Keys of a shard, the unit that one thread searches: a multiple of a tile and of BLOCK."""
BLOCK = 32
"""Keys that Faiss's layout takes together."""

_faiss: Any = faiss
LEVELS = ((np.arange(16) - 7.5) * STEP).astype(np.float32)


class Shard:
    """Codes of keys in the order they came. Searches may run side by side, but not beside :meth:`append`.

    Args:
        mean, deviation: (d,) float32; coordinates are shifted and scaled by them before they are coded.
    """

    def __init__(self, mean: Floats, deviation: Floats) -> None:
        self.mean, self.deviation = mean, deviation
        dim = self._dim = len(mean)
        self._index: Any = faiss.IndexPQFastScan(dim, dim, 4, faiss.METRIC_INNER_PRODUCT)
        faiss.copy_array_to_vector(np.tile(LEVELS, dim), self._index.pq.centroids)
        self._index.is_trained = True

    @property
    def address(self) -> int:
        """Of Faiss's object, see index/native.py."""
        return object_address(self._index)

    @property
    def size(self) -> int:
        return int(self._index.ntotal)

    @property
    def nbytes(self) -> int:
        """Bytes of codes held."""
        return self.size * self._dim // 2

    def append(self, places: Floats) -> None:
        """Add keys, given by their coordinates (n, d); n is a multiple of BLOCK."""
        index = self._index
        before, after = self.size, self.size + len(places)
        if len(places) % BLOCK or after > SHARD_TOKENS:
            raise ValueError(f"a shard takes whole blocks of {BLOCK} up to {SHARD_TOKENS} keys, not {after}")
        wanted = after * self._dim // 2
        if wanted > index.codes.size():
            index.codes.resize(wanted)  # Faiss rounds up to a power of two
        codes = _faiss.rev_swig_ptr(index.codes.get(), index.codes.size())
        pack((places - self.mean) / self.deviation, codes[before * self._dim // 2 : wanted])
        index.ntotal2 = after
        index.ntotal = after

    def search(self, queries: Floats, scores: Floats, ids: npt.NDArray[np.int64]) -> None:
        """The best keys of each query.

        Args:
            queries: (g, d), scaled by :attr:`deviation`. scores, ids: (g, k) written: estimated inner products with the
                shifted keys, descending, and numbers of keys; k is at most :attr:`size`.
        """
        self._index.search(np.ascontiguousarray(queries), scores.shape[1], D=scores, I=ids)
