"""Indexes built on the GPU answer as those built on the CPU do."""

import pytest
import torch

from tests.unit.indexed_ring import layout
from tests.unit.test_device_builder import DeviceRing
from vllm_retrieval_attn.attention import cuda_builder
from vllm_retrieval_attn.index.build import build_segment, make_spaces
from vllm_retrieval_attn.index.calibrate import calibrated_share
from vllm_retrieval_attn.index.device_kernels import assign
from vllm_retrieval_attn.index.segment import SegmentShape
from vllm_retrieval_attn.store.layout import ROW_BUDGET, ROW_RERANK, ROW_TAIL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_full_budget_over_segments_built_on_the_gpu_equals_brute_force(dim):
    shape = layout(kv_heads=2, group=2, dim=dim, dtype="bfloat16")
    ring = DeviceRing(shape, "bfloat16", "cuda", layers_at_once=2)
    try:
        ring.device.warm_up()
        message, stored = ring.fill(1, [1000, 700], 3)
        ring.pages[:, 0] = 0.0
        ring.index_rows(message)
        message[:, ROW_BUDGET], message[:, ROW_RERANK], message[:, ROW_TAIL] = 999_999, 1 << 20, 1
        ring.start_all()
        ring.client.post(1, message)
        got, got_lse = ring.collect(2)
        want, want_lse = ring.wanted(message, stored)
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(got_lse.double(), want_lse, atol=1e-4, rtol=1e-4)
    finally:
        ring.close()


@pytest.mark.parametrize(("dim", "sampled"), [(64, 64), (128, 64), (256, 64), (64, 512)])
def test_a_build_takes_no_more_memory_than_it_is_planned_with(dim, sampled):
    heads, tokens = 8, 8192
    shape = SegmentShape(tokens, dim)
    torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda"))  # cuBLAS takes what it keeps
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pages = torch.randn(2, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)
    rows = pages.transpose(0, 1).contiguous()
    del pages
    slabs = torch.zeros(heads, shape.bytes, dtype=torch.uint8, device="cuda")
    spaces = make_spaces(rows[:, 0], torch.eye(dim, device="cuda").expand(heads, dim, dim))
    build_segment(shape, rows[:, 0], rows[:, 1], spaces, torch.zeros(heads), slabs)
    queries, lse = torch.randn(heads, sampled, dim, device="cuda"), torch.full((heads, sampled), 9.0, device="cuda")
    calibrated_share(shape, slabs, rows[:, 0].float(), spaces, queries, lse)
    used = torch.cuda.max_memory_allocated() - before
    print(f"d {dim}, {sampled} sampled queries: {used / (4 * heads * tokens * dim):.2f} arrays of the keys' size")
    assert used <= cuda_builder.build_bytes(heads, tokens, dim, sampled)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_assignment_on_the_gpu_finds_the_nearest_centroids(dim):
    torch.manual_seed(0)
    points = torch.randn(3, 1000, dim)
    centroids = points[:, :70] + 0.3 * torch.randn(3, 70, dim)
    labels, sums, sizes = (part.cpu() for part in assign(points.cuda(), centroids.cuda(), True))
    distances = torch.cdist(points, centroids)
    found = distances.gather(2, labels[..., None])[..., 0]
    torch.testing.assert_close(found, distances.amin(2), atol=0, rtol=1e-3)  # TF32
    torch.testing.assert_close(sizes, torch.zeros_like(sizes).scatter_add_(1, labels, torch.ones(3, 1000)))
    torch.testing.assert_close(
        sums, torch.zeros_like(sums).scatter_add_(1, labels[..., None].expand_as(points), points)
    )
    torch.testing.assert_close(assign(points.cuda(), centroids.cuda(), False)[0].cpu(), labels)


def test_a_build_launches_its_kernels_without_waiting_for_one():
    shape = layout(kv_heads=4, group=2, dim=128, dtype="bfloat16")
    ring = DeviceRing(shape, "bfloat16", "cuda", layers_at_once=2)
    try:
        ring.device.warm_up()
        rows = torch.randn(8, 2, shape.segment_tokens, 128, device="cuda", dtype=torch.bfloat16)
        matrices = torch.eye(128, device="cuda").expand(8, 128, 128).contiguous()
        most = shape.group * shape.samples
        queries, lse = torch.randn(8, most, 128, device="cuda"), torch.full((8, most), 9.0, device="cuda")
        turns = torch.zeros(8, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            slabs = ring.device._work._slabs(rows, matrices, turns, queries, lse)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert slabs.shape == (8, shape.slab_bytes)
    finally:
        ring.close()


def test_the_test_above_sees_a_wait():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(2, device="cuda").cpu()
    finally:
        torch.cuda.set_sync_debug_mode("default")
