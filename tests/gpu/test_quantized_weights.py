# SPDX-License-Identifier: Apache-2.0
"""Models with fp8 and AWQ weights: all rows read give the answers of full attention with the same weights."""

import gc

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize(("weights", "kind"), [("fp8", "Fp8"), ("awq", "AWQ")])
def test_answers_are_those_of_full_attention(weights, kind, tmp_path):
    pytest.importorskip("vllm")
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.e2e.quantized import answers, write
    from tests.e2e.reuse_engine import apart

    options = write(tmp_path / "model", weights)
    full, kinds = answers(tmp_path / "model", "FLASH_ATTN", None, **options)
    gc.collect()
    cleanup_dist_env_and_memory()
    assert kinds
    assert all(kind.lower() in name.lower() for name in kinds), kinds
    knobs = {"host_memory_gb": 0.4, "rows": 1 << 15, "max_rows": 1 << 15, "resident_tokens": 1024, "poison_freed": True}
    ours, same = answers(tmp_path / "model", "retrieval", knobs, **options)
    assert same == kinds
    assert ours[1].retrieval["path"] == "sketch"
    assert ours[1].retrieval["host_tokens"] > 4000
    # In 16 bits near ties part.
    assert sum(apart(mine, its) for mine, its in zip(ours, full, strict=True)) <= 1
