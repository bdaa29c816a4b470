"""The kernels of a build on the GPU, run by Triton's interpreter, against their twin on the CPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
from vllm_retrieval_attn.index.build import _assign
from vllm_retrieval_attn.index.device_kernels import assign

torch.manual_seed(0)
for heads, n, dim, count in [(2, 200, 16, 12), (1, 300, 80, 70), (1, 130, 128, 128), (1, 70, 256, 40)]:
    points = torch.randn(heads, n, dim)
    centroids = points[:, :count] + 0.3 * torch.randn(heads, count, dim)
    for got, want in zip(assign(points, centroids, True), _assign(points, centroids, True), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)
    labels, sums, sizes = assign(points, centroids, False)
    torch.testing.assert_close(labels, _assign(points, centroids, False)[0])
    assert not sums.any() and not sizes.any()
print("same")
"""


def test_assignment_and_sums_are_those_of_the_cpu():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "same", done.stderr
