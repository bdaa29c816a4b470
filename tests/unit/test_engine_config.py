# SPDX-License-Identifier: Apache-2.0
"""The knob for codes on the GPU, where it has a meaning and where not."""

from types import SimpleNamespace

import pytest

from vllm_retrieval_attn.core.config import RetrievalConfig


@pytest.fixture
def with_sketch():
    pytest.importorskip("vllm")
    from vllm_retrieval_attn.plugin.engine_config import with_sketch

    return with_sketch


@pytest.mark.parametrize(("on_cpu", "index"), [(True, "attention"), (False, "flat"), (False, "none")])
def test_there_is_no_sketch_on_cpu_or_with_another_index(with_sketch, on_cpu, index):
    assert with_sketch(RetrievalConfig(index=index), on_cpu).sketch_gb == 0
    with pytest.raises(ValueError, match="sketch_gb=2 has no meaning"):
        with_sketch(RetrievalConfig(index=index, sketch_gb=2), on_cpu)


def test_on_a_gpu_there_is_one_unless_it_is_declined(with_sketch):
    assert with_sketch(RetrievalConfig(), False).sketch_gb is None
    assert with_sketch(RetrievalConfig(sketch_gb=1.5), False).sketch_gb == 1.5
    assert with_sketch(RetrievalConfig(sketch_gb=0, page_tokens=256), False).sketch_gb == 0
    with pytest.raises(ValueError, match="set page_tokens to 1024, or sketch_gb to 0"):
        with_sketch(RetrievalConfig(page_tokens=256), False)


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize(("on_gpu", "index"), [(True, "attention"), (True, "flat"), (True, "none"), (False, "flat")])
def test_vllms_first_model_runner_is_refused_on_a_gpu(monkeypatch, on_gpu, index, second):
    platforms = pytest.importorskip("vllm.platforms")
    from vllm_retrieval_attn.plugin.engine_config import check_runner

    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(is_cuda=lambda: on_gpu))
    asked = RetrievalConfig(index=index), SimpleNamespace(use_v2_model_runner=second)
    if second or not on_gpu or index == "none":
        check_runner(*asked)
    else:
        with pytest.raises(ValueError, match=r"first model runner on a GPU.*set VLLM_USE_V2_MODEL_RUNNER=1"):
            check_runner(*asked)
