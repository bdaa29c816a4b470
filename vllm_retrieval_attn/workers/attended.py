"""Which keys of a row the index attends to exactly: one search of a KV head over all its indexed segments.

The request may end at any moment, which poisons its entries in the tables. The search runs on copies of them, made
while the request was there; the slabs that they name keep their contents until the probe is done (store/indexing.py).
"""

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.index.kernels import scratch
from vllm_retrieval_attn.index.search import COUNT_EXACT, MAX_NODES, Scratch, offsets_of
from vllm_retrieval_attn.index.segment import NODE, SegmentShape
from vllm_retrieval_attn.store.layout import PROBE_VALID, ROW_INDEXED, ROW_TABLE, ROW_TOKENS, Layout
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.shares import NODE_WORK, attend_unit
from vllm_retrieval_attn.workers.sync import full_fence


class AttendedRows:
    """Called by workers/prober.py, see there for arguments and result. For one thread: calls share scratch memory.

    Args:
        layout, views: the shared file of the rank. scale: softmax scale.
    """

    def __init__(self, layout: Layout, views: Views, scale: float) -> None:
        self._layout, self._views, self._scale = layout, views, scale
        self._at = offsets_of(SegmentShape(layout.segment_tokens, layout.dim))
        self._work = scratch(layout.group, layout.dim)
        nodes = min(MAX_NODES, layout.table_segments * layout.segment_tokens // NODE)
        self._index_work = Scratch(layout.group, layout.dim, nodes).arrays

    def __call__(
        self, layer: int, head: int, row: npt.NDArray[np.int64], queries: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.bool_]:
        lay, views = self._layout, self._views
        tokens, indexed = int(row[ROW_TOKENS]), int(row[ROW_INDEXED])
        covered = indexed * lay.segment_tokens
        kept = np.ones((lay.group, tokens), np.bool_)
        if not indexed:
            return kept
        slot = int(row[ROW_TABLE])
        table, slab_table = views.tables[slot].copy(), views.slab_tables[slot].copy()
        full_fence()
        pages, slabs = table[: lay.page_tokens_owned(tokens)], slab_table[:indexed]
        if not views.probe_numbers[PROBE_VALID] or min(pages.min(), slabs.min()) < 0:
            return kept
        q = queries * np.float32(self._scale)
        running = (np.zeros_like(q), np.full(lay.group, -np.inf, np.float32), np.zeros(lay.group, np.float32))
        counts, chosen = np.zeros(5, np.int64), np.empty(covered, np.int64)
        attend_unit(
            0, covered // NODE * NODE_WORK, row, head, lay.kv_heads, lay.dim, lay.layers, lay.page_tokens,
            lay.dtype_code, lay.segment_tokens, lay.slab_bytes, layer, table, slab_table,
            views.pages16, views.pages32, views.index8, views.index16, views.index32, views.index64, self._at, q,
            *running, self._work, self._index_work, np.empty(lay.table_segments, np.int64), counts, chosen,
        )  # fmt: skip
        kept[:, :covered] = False
        kept[:, chosen[: counts[COUNT_EXACT]]] = True
        return kept
