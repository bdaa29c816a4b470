"""Patches that a start of vLLM needs; the others are shown by the engine tests."""

from vllm.platforms import current_platform
from vllm.triton_utils import dispatcher

from vllm_retrieval_attn import compat


def test_vllms_scan_of_modules_passes_with_numba_loaded():
    import numba  # noqa: F401  # loads llvmlite

    compat.install()
    if current_platform.is_cpu():
        assert getattr(dispatcher._rebind_kernels, compat._MARK)
    dispatcher._rebind_kernels([])
