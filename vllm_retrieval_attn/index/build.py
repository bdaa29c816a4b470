"""Building the attention index of a segment: cluster the keys, code three levels, average the values.

Written in torch over all heads of a layer at once, so that the same code runs on one CPU thread and on a GPU.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_retrieval_attn.index.blas import one_blas_thread
from vllm_retrieval_attn.index.dot import row_bytes, row_width
from vllm_retrieval_attn.index.segment import (
    GROUP,
    HEAD_NUMBERS,
    HEAD_SHARE,
    HEAD_STATE,
    HEAD_TURN,
    LEAVES,
    STEP4,
    SegmentShape,
)
from vllm_retrieval_attn.index.spaces import query_transform

ITERATIONS = 2
"""Rounds of k-means."""
_TINY = 1e-12


@dataclass
class Spaces:
    """Transforms of H heads, shared by the segments that were built with them.

    Attributes:
        to_keys, to_queries: (H, d, d) float32; ``to_queries`` is exact in bfloat16, which searches read.
    """

    to_keys: torch.Tensor
    to_queries: torch.Tensor

    @classmethod
    def of(cls, to_queries: torch.Tensor) -> "Spaces":
        """The pair that belongs to transforms of queries (H, d, d)."""
        if to_queries.device.type == "cpu":  # MKL's batched LU fails now and then ("Parameter 6 was incorrect")
            one_blas_thread()
            inverse = torch.from_numpy(np.linalg.inv(to_queries.double().numpy()))
        else:
            inverse, _ = torch.linalg.inv_ex(to_queries.double())  # does not wait for the GPU
        return cls(inverse.mT.float(), to_queries)


def make_spaces(keys: torch.Tensor, moment: torch.Tensor) -> Spaces:
    """Transforms from a first segment's keys (H, n, d) and its queries' second moment (H, d, d)."""
    return Spaces.of(query_matrices(keys, moment))


def query_matrices(keys: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """(H, d, d) float32 transforms of queries alone, rounded to the bfloat16 in which searches read them."""
    return query_transform(keys, moment).bfloat16().float()


def cluster(points: torch.Tensor, count: int, iterations: int = ITERATIONS) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means with Euclidean distance, started from evenly spaced points.

    Args:
        points: (H, n, d) float32. count: centroids.

    Returns:
        (H, n) int64 labels and (H, count, d) centroids; a centroid may be left without points.
    """
    n = points.shape[1]
    centroids = points[:, n // count // 2 :: n // count][:, :count].contiguous()
    for _ in range(iterations):
        _, sums, sizes = _assign(points, centroids, True)
        centroids = torch.where(sizes[..., None] > 0, sums / sizes[..., None].clamp_min(1), centroids)
    return _assign(points, centroids, False)[0], centroids


def _assign(
    points: torch.Tensor, centroids: torch.Tensor, sum_up: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`vllm_retrieval_attn.index.device_kernels.assign`, which this is on a GPU."""
    if points.device.type != "cpu":
        from vllm_retrieval_attn.index.device_kernels import assign

        return assign(points, centroids, sum_up)
    half = centroids.square().sum(-1)[:, None] / -2
    # Scores of a few hundred points at a time stay in the processor's cache.
    found = [
        torch.cat([torch.addmm(h, part, c.T).max(1)[1] for part in rows.split(512)])
        for h, rows, c in zip(half, points, centroids, strict=True)
    ]
    labels = torch.stack(found)
    sums, sizes = torch.zeros_like(centroids), torch.zeros_like(half[:, 0])
    if sum_up:
        sums.scatter_add_(1, labels[..., None].expand_as(points), points)
        sizes.scatter_add_(1, labels, torch.ones_like(points[..., 0]))
    return labels, sums, sizes


def order_points(points: torch.Tensor, size: int) -> torch.Tensor:
    """An order in which every run of ``size`` points lies close together, all runs being equally long.

    Recursive bisection at the median along the direction of largest variance (a principal-axis tree).

    Args:
        points: (H, n, d) float32, n a multiple of ``size``.

    Returns:
        (H, n) int64 positions.
    """
    heads, n, dim = points.shape
    order = torch.arange(n, device=points.device).expand(heads, n)
    length = n
    while length > size:
        parts = 2 if length // size % 2 == 0 else length // size
        runs = points.reshape(heads * (n // length), length, dim)
        centred = runs - runs.mean(1, keepdim=True)
        spread = centred.mT @ centred
        # Scaled once, so that the power iteration needs no more of it.
        spread = spread / spread.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(_TINY)
        axis = spread.sum(-1, keepdim=True) + spread.diagonal(dim1=-2, dim2=-1)[..., None]
        for _ in range(4):
            axis = spread @ axis
        place = (centred @ axis).squeeze(-1).argsort(1).view(heads, n // length, length)
        place = (place + torch.arange(n // length, device=points.device)[None, :, None] * length).view(heads, n)
        points = points.gather(1, place[..., None].expand(-1, -1, dim))
        order = order.gather(1, place)
        length //= parts
    return order


def _code(points: torch.Tensor, step: torch.Tensor, levels: int) -> torch.Tensor:
    """Uniform codes 0 .. levels-1 around zero; ``step`` broadcasts over ``points``."""
    return (points / step).add_((levels - 1) / 2).round_().clamp_(0, levels - 1)


def pack_blocks(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes into blocks of 16 rows (index/dot.py).

    Args:
        codes: (..., n, d) integral values 0..15, n a multiple of 16, d of 8.

    Returns:
        (..., n // 16, d * 8) uint8.
    """
    *lead, n, dim = codes.shape
    byte = codes.to(torch.uint8).view(*lead, n // 16, 16, dim // 8, 2, 4)
    packed = byte[..., 0, :] | (byte[..., 1, :] << 4)
    return packed.transpose(-2, -3).reshape(*lead, n // 16, dim * 8)


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes into rows that stand alone (index/dot.py): (..., d) to (..., row_bytes(d)) uint8."""
    *lead, dim = codes.shape
    size, width = row_bytes(dim), row_width(dim)
    byte = codes.to(torch.uint8)
    if 2 * size != dim:
        byte = torch.nn.functional.pad(byte, (0, 2 * size - dim))
    byte = byte.view(*lead, size // width, 2, width)
    return (byte[..., 0, :] | (byte[..., 1, :] << 4)).reshape(*lead, size)


def build_segment(
    shape: SegmentShape,
    keys: torch.Tensor,
    values: torch.Tensor,
    spaces: Spaces,
    turns: torch.Tensor,
    slabs: torch.Tensor,
    share: float = 1.0,
) -> None:
    """Build the index of one segment for H heads.

    Args:
        keys, values: (H, n, d), any float type; n == shape.tokens.
        spaces: transforms of these heads. turns: (H,) where ``spaces.to_queries`` of each head lies, see HEAD_TURN.
        slabs: (H, shape.bytes) uint8 to write, on the device of ``keys`` or on the CPU. The state is written last.
        share: of keys to scan, until calibrated.
    """
    heads, _, dim = keys.shape
    device = keys.device
    mean = keys.float().mean(1)
    points = (keys.float() - mean[:, None]) @ spaces.to_keys.mT
    labels, centroids = cluster(points, shape.leaves)
    # Leaves that lie close together become neighbours, so that a node is 16 of them in a row.
    place = order_points(centroids, LEAVES)
    rank = torch.empty_like(place).scatter_(1, place, torch.arange(shape.leaves, device=device).expand(heads, -1))
    labels = rank.gather(1, labels)
    labels, order = labels.sort(dim=1, stable=True)
    points = points.gather(1, order[..., None].expand(-1, -1, dim))
    sizes = torch.zeros(heads, shape.leaves, device=device).scatter_add_(1, labels, torch.ones_like(points[..., 0]))
    wide = labels[..., None].expand(-1, -1, dim)

    def means(rows: torch.Tensor, leaves: int) -> torch.Tensor:
        """Mean of the rows of every ``leaves`` leaves; zero where there are none."""
        sums = torch.zeros(heads, shape.leaves, rows.shape[-1], device=device)
        sums = sums.scatter_add_(1, labels[..., None].expand(-1, -1, rows.shape[-1]), rows)
        sums = sums.view(heads, -1, leaves, rows.shape[-1]).sum(2)
        return sums / sizes.view(heads, -1, leaves).sum(2).clamp_min(1)[..., None]

    nodes = means(points, LEAVES)
    node_step = nodes.abs().amax(-1).clamp_min(_TINY) / 127.5
    node_codes = _code(nodes, node_step[..., None], 256)
    coarse = ((node_codes - 127.5) * node_step[..., None]).repeat_interleave(LEAVES, 1)

    leaves = means(points, 1) - coarse
    leaf_step = leaves.square().mean(-1).sqrt().clamp_min(_TINY) * STEP4
    leaf_codes = _code(leaves, leaf_step[..., None], 16)
    node_spread = (points - coarse.gather(1, wide)).square_().mean(-1, keepdim=True)
    coarse = coarse + (leaf_codes - 7.5) * leaf_step[..., None]

    rest = points.sub_(coarse.gather(1, wide))  # points are not needed any more
    key_step = means(rest.square().mean(-1, keepdim=True), 1)[..., 0].sqrt().clamp_min(_TINY) * STEP4
    key_codes = pack_rows(_code(rest, key_step.gather(1, labels)[..., None], 16))
    del points, rest

    value = means(values.gather(1, order[..., None].expand(-1, -1, dim)).float(), GROUP)
    value_step = value.abs().amax(-1).clamp_min(_TINY) / 127

    padded = torch.zeros(heads, shape.node_blocks * 16, dim, device=device)
    padded[:, : shape.nodes] = node_codes
    head = torch.zeros(heads, HEAD_NUMBERS, dtype=torch.float64, device=device)
    head[:, HEAD_TURN] = turns.to(device)
    head[:, HEAD_SHARE] = share
    parts = {
        "head": head,
        "mean": mean,
        "node_step": node_step,
        "node_spread": means(node_spread, LEAVES),
        "leaf_step": leaf_step,
        "key_step": key_step,
        "ends": sizes.cumsum(1).to(torch.int32).to(torch.uint16),
        "node_codes": torch.stack((pack_blocks((padded / 16).floor()), pack_blocks(padded % 16)), 1),
        "leaf_codes": pack_blocks(leaf_codes),
        "key_codes": key_codes,
        "order": order.to(torch.int32).to(torch.uint16),
        "value_step": value_step,
        "values": (value / value_step[..., None]).round().to(torch.int8),
    }
    for name, part in parts.items():
        raw = part.contiguous().view(heads, -1).view(torch.uint8)
        begin = shape.offsets[name]
        slabs[:, begin : begin + raw.shape[1]].copy_(raw)
    head[:, HEAD_STATE] = 1.0
    slabs[:, : HEAD_NUMBERS * 8].copy_(head.view(torch.uint8))
