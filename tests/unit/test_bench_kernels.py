"""The comparison of inner loops with Faiss measures what it says."""

import numpy as np
import torch

from vllm_retrieval_attn.bench.kernels import measure, score_codes
from vllm_retrieval_attn.index.build import pack_rows
from vllm_retrieval_attn.index.dot import row_bytes, row_width


def test_scores_of_codes_are_sums_of_products():
    random = np.random.default_rng(0)
    codes, queries = random.integers(0, 16, (50, 64)), np.zeros((3, 2 * row_bytes(64)), np.int8)
    queries[:, :64] = random.integers(-127, 128, (3, 64))
    out = np.empty((3, 50), np.int32)
    score_codes(pack_rows(torch.from_numpy(codes)).numpy(), queries, row_width(64), row_bytes(64), out)
    np.testing.assert_array_equal(out, queries[:, :64].astype(np.int64) @ codes.T)


def test_every_way_is_timed():
    rows = measure(64, 4096, 2, 50, 1)
    assert [(what, whom, size) for what, whom, _, size in rows] == [
        ("codes", "ours", 32),
        ("codes", "Faiss FastScan", 32),
        ("codes", "Faiss scalar 4-bit", 32),
        ("rows", "Faiss scalar bf16", 128),
        ("rows", "Faiss flat float32", 256),
        ("rows", "ours, values too", 256),
    ]
