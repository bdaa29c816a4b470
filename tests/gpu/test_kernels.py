# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the CUDA layer against their references."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_in_place_equals_reference(dim, dtype):
    from vllm_retrieval_attn.device.cuda_kernels import merge_in_place
    from vllm_retrieval_attn.device.merge import merge_partials

    rows, heads, more = 7, 5, 4
    torch.manual_seed(0)
    out = torch.randn(rows, heads, dim, device="cuda").to(dtype)
    lse = torch.randn(heads, rows, device="cuda")
    part, part_lse = torch.randn(more, heads, dim, device="cuda"), torch.randn(heads, more, device="cuda")
    part_lse[0, 0] = -torch.inf
    lse[1, 3] = -torch.inf
    index = torch.tensor([3, 0, 6, 5], device="cuda")
    want, want_lse = merge_partials(out[index].float(), lse.T[index], part, part_lse.T)
    before = out.clone()
    merge_in_place(out, lse, part, part_lse, index)
    torch.testing.assert_close(out[index].float(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.T[index], want_lse)
    untouched = torch.tensor([1, 2, 4], device="cuda")
    assert torch.equal(out[untouched], before[untouched])


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_mirror_writes_every_row_to_pinned_memory(dim):
    from vllm_retrieval_attn.device.cuda_kernels import mirror

    blocks, heads, block, page = 9, 3, 16, 64
    cache = torch.randn(blocks, heads, block, 2 * dim, device="cuda").bfloat16()
    arena = torch.full((2, 4, heads, page, 2, dim), float("nan"), dtype=torch.bfloat16)
    status = torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), arena.numel() * 2, 3)
    assert int(status) == 0
    slots = torch.randperm(blocks * block, device="cuda")[:50]
    tokens = torch.tensor([4, 9, 33], device="cuda")
    places = [(3, 5), (0, 63), (2, 0)]
    targets = torch.tensor([p * heads * 2 * page * dim + o * 2 * dim for p, o in places], device="cuda")
    layer = 1
    mirror(cache, slots, tokens, targets, arena[layer].data_ptr(), page * 2 * dim)
    torch.cuda.synchronize()
    for token, (p, o) in zip(tokens.tolist(), places, strict=True):
        slot = int(slots[token])
        row = cache[slot // block, :, slot % block].cpu()
        assert torch.equal(arena[layer, p, :, o, 0], row[:, :dim])
        assert torch.equal(arena[layer, p, :, o, 1], row[:, dim:])
        arena[layer, p, :, o] = float("nan")
    assert arena.isnan().all()
    torch.cuda.cudart().cudaHostUnregister(arena.data_ptr())
