"""Triton kernels of a build on the GPU: what would take many kernels, or much memory, in torch."""

import torch
import triton
import triton.language as tl

_POINTS = 64 * 128
_CENTROIDS = 32 * 128
"""Numbers that a program holds at once: 32 KB of points and twice 16 KB of centroids fit every GPU's shared memory."""


@triton.jit
def _assign_kernel(  # type: ignore[no-untyped-def]  # Triton compiles the signature
    points,
    centroids,
    half,
    labels,
    sums,
    sizes,
    n,
    count,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    SUM_UP: tl.constexpr,
):
    """One program finds the nearest centroid of ROWS points of one head: the largest c . x - |c|^2 / 2."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    inside = (row < n)[:, None] & (column < DIM)[None, :]
    source = points + (head * n + row[:, None]) * DIM + column[None, :]
    x = tl.load(source, mask=inside, other=0.0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    label = tl.zeros((ROWS,), tl.int32)
    for begin in range(0, count, PART):
        part = begin + tl.arange(0, PART)
        there = part < count
        place = centroids + (head * count + part[None, :]) * DIM + column[:, None]
        c = tl.load(place, mask=there[None, :] & (column < DIM)[:, None], other=0.0)
        score = tl.dot(x, c) - tl.load(half + head * count + part, mask=there, other=float("inf"))[None, :]
        top, which = tl.max(score, 1, return_indices=True)
        label = tl.where(top > best, begin + which, label)
        best = tl.maximum(best, top)
    tl.store(labels + head * n + row, label.to(tl.int64), mask=row < n)
    if SUM_UP:
        target = sums + (head * count + label[:, None]) * DIM + column[None, :]
        tl.atomic_add(target, tl.load(source, mask=inside, other=0.0), mask=inside, sem="relaxed")
        tl.atomic_add(sizes + head * count + label, 1.0, mask=row < n, sem="relaxed")


def assign(
    points: torch.Tensor, centroids: torch.Tensor, sum_up: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The centroid nearest to each point, by products in TF32, and what lies at each centroid.

    Args:
        points: (H, n, d) float32. centroids: (H, count, d) float32. sum_up: whether sums and sizes are wanted.

    Returns:
        (H, n) int64 labels; (H, count, d) sums of points and (H, count) their numbers, both zero unless wanted.
    """
    heads, n, dim = points.shape
    count = centroids.shape[1]
    points, centroids = points.contiguous(), centroids.contiguous()
    half = centroids.square().sum(-1) / 2
    labels = torch.empty(heads, n, dtype=torch.int64, device=points.device)
    sums, sizes = torch.zeros_like(centroids), torch.zeros_like(half)
    padded = max(16, triton.next_power_of_2(dim))
    rows = min(128, _POINTS // padded)
    _assign_kernel[(triton.cdiv(n, rows), heads)](
        points, centroids, half, labels, sums, sizes, n, count, DIM=dim, PADDED=padded, ROWS=rows,
        PART=max(16, min(64, _CENTROIDS // padded)), SUM_UP=sum_up, num_warps=4,
    )  # fmt: skip
    return labels, sums, sizes
