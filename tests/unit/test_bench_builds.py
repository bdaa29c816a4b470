"""The command that times builds."""

import torch

from vllm_retrieval_attn.bench import builds


def test_every_part_is_timed():
    found = builds.measure(torch.device("cpu"), heads=2, tokens=512, dim=16, sampled=8, repeats=1)
    assert list(found) == ["transform", "build", "calibration"]
    assert all(value > 0 for value in found.values())
