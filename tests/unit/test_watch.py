# SPDX-License-Identifier: Apache-2.0
"""`vllm-retrieval bench watch`: the interval that it tells, and the switch of what is gathered."""

import pytest

from vllm_retrieval_attn.bench.watch import CONTROL, interval


def test_the_interval_is_students():
    low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low + high) / 2 == pytest.approx(3.0)
    assert (high - low) / 2 == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)


def test_a_difference_that_is_always_there_leaves_zero_out_and_noise_does_not():
    noise = [0.1, -0.2, 0.15, -0.1, 0.05, -0.05, 0.2, -0.15, 0.0, 0.02]
    low, high = interval(noise)
    assert low < 0 < high
    low, high = interval([1 + x for x in noise])
    assert 0 < low < 1 < high


def test_what_is_gathered_can_be_switched_off_and_on_again():
    pytest.importorskip("vllm")
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_retrieval_attn.plugin.control import WorkerControl
    from vllm_retrieval_attn.plugin.worker_stats import WorkerStats

    control = resolve_obj_by_qualname(CONTROL)()
    assert isinstance(control, WorkerControl)
    stats = WorkerStats(None, 0)
    try:
        control.retrieval_gather(False)
        stats.count("some", 1)
        assert stats._more == {}
    finally:
        control.retrieval_gather(True)
    stats.count("some", 1)
    assert stats._more == {"some": 1}
