# SPDX-License-Identifier: Apache-2.0
"""For tests: what no row may read any more becomes NaN."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm_retrieval_attn.core.ownership import Split
    from vllm_retrieval_attn.plugin.metadata import RetrievalMetadata


def poison_left_blocks(
    batches: "Iterable[RetrievalMetadata]", split: "Split", kv_caches: dict[str, torch.Tensor]
) -> None:
    """Overwrite the paged blocks that the rows of a step will never attend to again.

    Args:
        batches: of the step. kv_caches: of each layer, (blocks, kv_heads, block, 2 * d).
    """
    for metadata in batches:
        after = split.window_starts(metadata.computed + metadata.query_lens)
        for row in range(len(after)):
            left = np.arange((after[row] - metadata.windows[row]) // split.block_size)
            columns = split.sink_end // split.block_size + left
            blocks = metadata.resident_table[row][torch.from_numpy(columns)].long()
            for cache in kv_caches.values():
                cache[blocks] = float("nan")
