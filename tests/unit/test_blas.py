"""Linear algebra of the index takes one thread, whatever else OpenBLAS is set to."""

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from vllm_retrieval_attn.index.blas import one_blas_thread
from vllm_retrieval_attn.index.build import Spaces, make_spaces
from vllm_retrieval_attn.workers.slab_work import drift


def threads():
    return [library["num_threads"] for library in threadpool_info() if library["internal_api"] == "openblas"]


@pytest.mark.parametrize("name", ["cholesky", "eigh", "inv", "solve"])
def test_all_decompositions_take_one_thread(monkeypatch, name):
    seen = []
    function = getattr(np.linalg, name)
    monkeypatch.setattr(np.linalg, name, lambda *args: seen.append(set(threads())) or function(*args))
    moment = torch.eye(8).expand(2, 8, 8)
    with threadpool_limits(2, user_api="blas"):
        assert set(threads()) == {2}
        for decompose in (
            lambda: make_spaces(torch.randn(2, 40, 8), moment),
            lambda: Spaces.of(moment),
            lambda: drift(moment, torch.randn(2, 5, 8)),
        ):
            one_blas_thread.cache_clear()
            threadpool_limits(2, user_api="blas")
            decompose()
    one_blas_thread.cache_clear()
    assert seen
    assert all(found == {1} for found in seen)
