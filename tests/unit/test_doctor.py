# SPDX-License-Identifier: Apache-2.0
"""What a model needs, by numbers that can be checked by hand."""

import pytest

from vllm_retrieval_attn.core.config import RetrievalConfig
from vllm_retrieval_attn.doctor.sizing import ModelShape, needs

LLAMA = ModelShape(layers=32, kv_heads=8, head_size=128, itemsize=2)


def test_memory_of_a_long_request_on_llama_3_8b():
    need = needs(LLAMA, 131_072, 1, 1, 16, 8192, RetrievalConfig())
    host = 131_072 - 128
    assert need["full_gb"] == pytest.approx(17.18, abs=0.01)
    assert need["codes_gb"] == pytest.approx(host * 256 * 66 / 1e9)  # 64 bytes and a float16 step
    assert need["host_gb"] == pytest.approx(host * 256 * (512 + 65 + 8 + 4) / 1e9)  # row, code, number, sample
    assert need["paged_gb"] + need["codes_gb"] < 0.3 * need["full_gb"]


def test_another_index_has_no_codes():
    need = needs(LLAMA, 131_072, 2, 1, 16, 8192, RetrievalConfig(index="flat"))
    assert need["codes_gb"] == 0
    assert need["host_gb"] == pytest.approx(2 * (131_072 - 128) * 131_072 / 1e9)
