# SPDX-License-Identifier: Apache-2.0
"""What a layer's kernels found for one row among host tokens alone, read back for comparison with exact attention."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_retrieval_attn.device.decode_kernels import DecodeKernels
from vllm_retrieval_attn.device.decode_step import PAGE, RUN, StepRow, items_of

Floats = npt.NDArray[np.float32]


class HostPart(NamedTuple):
    """Attributes:
    out, lse: (heads, d) and (heads,) float32, attention over the host tokens read, each weighted, and its LSE.
    chosen: numbers of these, ascending, one int32 array a KV head.
    """

    out: Floats
    lse: Floats
    chosen: list[npt.NDArray[np.int32]]


def host_part(kernels: DecodeKernels, rows: list[StepRow], number: int) -> HostPart:
    """Of row ``number`` of the descriptor, in the layer whose kernels ran last. Waits for the device, and allocates.

    The parts of all runs are merged as in decode_merge.cuh, without the paged one.
    """
    g, work = kernels.geometry, kernels.work
    capacity = max(1, rows[number].tokens)
    ids, _, counts = kernels.chosen(capacity)
    chosen = [ids[number, head, : int(counts[number, head])].cpu().numpy() for head in range(g.kv_heads)]
    outs, lses = [], []
    for head in range(g.kv_heads):
        first = items_of(rows, number, head, g).start // RUN
        runs = slice(first, first + -(-rows[number].tokens // (RUN * PAGE)))
        read = work.counts[runs] > 0
        sums, stats = work.sums[runs][read], work.stats[runs][read]
        top = stats[..., 0].amax(0)
        factors = torch.exp(stats[..., 0] - top)
        total = (factors * stats[..., 1]).sum(0)
        outs.append((factors[..., None] * sums).sum(0) / total[:, None])
        lses.append(top + torch.log(total))
    return HostPart(torch.cat(outs).cpu().numpy(), torch.cat(lses).cpu().numpy(), chosen)
