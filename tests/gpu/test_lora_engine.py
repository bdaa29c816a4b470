# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in decode steps that are whole CUDA graphs: all rows read give full attention's answers."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_adapters_in_graphs_give_full_attention_and_share_no_prefix(tmp_path):
    pytest.importorskip("vllm")
    from tests.e2e.lora_engine import CALLS, compare

    knobs = {"host_memory_gb": 0.4, "rows": 1 << 15, "max_rows": 1 << 15}
    found = compare(tmp_path / "lora", "FLASH_ATTN", knobs, dtype="bfloat16")
    assert found["different"] == 3
    assert found["graphs"] > 6 * 8
    assert found["cached"][3] == 0 < found["cached"][2]
    # In 16 bits near ties part: most answers are the same, word by word or up to a tie.
    assert sum(found["apart"]) <= 1, found["apart"]
    assert len(found["apart"]) == len(CALLS) + 3
