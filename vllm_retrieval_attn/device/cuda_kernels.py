# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the CUDA layer: mirror K and V to the host, merge partial results in place."""

from typing import Any

import torch
from vllm.triton_utils import tl, triton


@triton.jit
def _mirror_kernel(  # type: ignore[no-untyped-def]  # Triton compiles the signature
    cache,
    slots,
    tokens,
    targets,
    layer_address,
    block_size,
    stride_block,
    stride_head,
    stride_token,
    head_elements,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One program copies K and V of one (token, KV head) from the paged cache to pinned host memory."""
    item = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + tl.load(tokens + item))
    source = (slot // block_size) * stride_block + head * stride_head + (slot % block_size) * stride_token
    # An address below 4 GB arrives as a 32-bit integer.
    arena = layer_address.to(tl.int64).to(tl.pointer_type(cache.dtype.element_ty))
    target = tl.load(targets + item) + head * head_elements
    column = tl.arange(0, PADDED)
    inside = column < DIM
    tl.store(arena + target + column, tl.load(cache + source + column, mask=inside), mask=inside)
    values = tl.load(cache + source + DIM + column, mask=inside)
    tl.store(arena + target + DIM + column, values, mask=inside)


def mirror(
    cache: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    layer_address: int,
    head_elements: int,
    only_compile: bool = False,
) -> None:
    """Copy K and V of batch tokens from the paged cache to the arena, on the current stream.

    Args:
        cache: (blocks, kv_heads, block, 2 * d), any strides with a dense last axis.
        slots: (T,) int64 slot of each batch token. tokens: (M,) int64 batch tokens to copy.
        targets: (M,) int64 element of each token's row (K, then V) in head 0 of the layer.
        layer_address: host address of the layer's first page, pinned.
        head_elements: elements of one head in one page. only_compile: launch nothing.
    """
    _, kv_heads, block, width = cache.shape
    strides = (cache.stride(axis) for axis in range(3))
    arguments = (cache, slots, tokens, targets, layer_address, block, *strides, head_elements)
    _start(_mirror_kernel, (len(tokens), kv_heads), arguments, only_compile, DIM=width // 2)


def _start(
    kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], only_compile: bool, **constants: Any
) -> None:
    constants |= {"PADDED": triton.next_power_of_2(constants["DIM"]), "num_warps": 1}
    if only_compile:
        kernel.warmup(*arguments, grid=grid, **constants)
    else:
        kernel[grid](*arguments, **constants)


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]  # Triton compiles the signature
    out,
    lse,
    more,
    more_lse,
    rows,
    stride_out_row,
    stride_out_head,
    stride_lse_row,
    stride_lse_head,
    stride_more_row,
    stride_more_head,
    stride_more_lse_row,
    stride_more_lse_head,
    HAS_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = item
    if HAS_ROWS:
        row = tl.load(rows + item)
    a = tl.load(lse + row * stride_lse_row + head * stride_lse_head)
    b = tl.load(more_lse + item * stride_more_lse_row + head * stride_more_lse_head)
    # FlashAttention reports +inf for a row without keys; both mean an empty set here.
    a = tl.where(a == float("inf"), float("-inf"), a)
    b = tl.where(b == float("inf"), float("-inf"), b)
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)
    wa = tl.exp(a - top)
    wb = tl.exp(b - top)
    both = wa + wb
    scale = tl.where(both > 0, both, 1.0)
    column = tl.arange(0, PADDED)
    inside = column < DIM
    place = out + row * stride_out_row + head * stride_out_head + column
    x = tl.load(place, mask=inside).to(tl.float32)
    y = tl.load(more + item * stride_more_row + head * stride_more_head + column, mask=inside).to(tl.float32)
    x = tl.where(wa > 0, x, 0.0)
    y = tl.where(wb > 0, y, 0.0)
    tl.store(place, ((x * wa + y * wb) / scale).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row * stride_lse_row + head * stride_lse_head, top + tl.log(both))


def merge_in_place(
    out: torch.Tensor,
    lse: torch.Tensor,
    more: torch.Tensor,
    more_lse: torch.Tensor,
    rows: torch.Tensor | None = None,
    only_compile: bool = False,
) -> None:
    """Merge ``more`` into ``out`` by log-sum-exp (device/merge.py is the reference).

    Args:
        out: (R, heads, d), updated. lse: (heads, R) float32, updated.
        more: (M, heads, d). more_lse: (heads, M) float32.
        rows: (M,) int64 rows of ``out`` that ``more`` belongs to; None: M == R, in order. only_compile: launch nothing.
    """
    arguments = (
        out, lse, more, more_lse, rows if rows is not None else lse, out.stride(0), out.stride(1), lse.stride(1),
        lse.stride(0), more.stride(0), more.stride(1), more_lse.stride(1), more_lse.stride(0),
    )  # fmt: skip
    grid = (more.shape[0], out.shape[1])
    _start(_merge_kernel, grid, arguments, only_compile, DIM=out.shape[-1], HAS_ROWS=rows is not None)


def warm_up(cache: torch.Tensor, heads: int, layer_address: int, head_elements: int) -> None:
    """Compile what prefill and searched steps launch, so that no request waits for it. Launches nothing.

    Args:
        cache: paged cache of a layer, as in :func:`mirror`; so are the last two. heads: query heads.
    """
    device, dtype, dim = cache.device, cache.dtype, cache.shape[-1] // 2
    tokens = torch.zeros(16, dtype=torch.int64, device=device)
    mirror(cache, tokens, tokens, tokens, layer_address, head_elements, only_compile=True)
    for rows in (16, 17):  # Triton tells strides that 16 divides from others
        out, lse = torch.empty(rows, heads, dim, device=device), torch.empty(heads, rows, device=device)
        of_pages = out.to(dtype)
        merge_in_place(out, lse, of_pages, lse, only_compile=True)
        merge_in_place(of_pages, lse, out, lse.T.contiguous().T, tokens, only_compile=True)
