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


@pytest.fixture
def two_threads():
    with threadpool_limits(2, user_api="blas"):
        yield


def test_one_thread_within_and_as_before_afterwards(two_threads):
    with one_blas_thread():
        assert set(threads()) == {1}
    assert set(threads()) == {2}


@pytest.mark.parametrize("name", ["cholesky", "eigh", "inv", "solve"])
def test_all_decompositions_take_one_thread(two_threads, monkeypatch, name):
    seen = []
    function = getattr(np.linalg, name)
    monkeypatch.setattr(np.linalg, name, lambda *args: seen.append(set(threads())) or function(*args))
    moment = torch.eye(8).expand(2, 8, 8)
    make_spaces(torch.randn(2, 40, 8), moment)
    Spaces.of(moment)
    drift(moment, torch.randn(2, 5, 8))
    assert seen
    assert all(found == {1} for found in seen)
