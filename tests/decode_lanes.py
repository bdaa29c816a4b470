# SPDX-License-Identifier: Apache-2.0
"""A layer of the decode kernels with CPU lanes; for emulated kernels and those of a GPU."""

import numpy as np

from tests.decode_machine import check_layer
from vllm_retrieval_attn.device.decode_step import Handed
from vllm_retrieval_attn.device.lane_loop import STOP


def check_lanes(machine, share):
    """A layer whose runs lanes do in part, and one in which they are late: the same, and what is told of it."""
    stamps = slice(-2, None)
    machine.handed = Handed(share, 1, 20_000_000_000)
    machine.start_lanes()
    check_layer(machine)
    assert not machine.work.read[stamps].any()  # the next layer tells
    done = machine.board.numpy().view(np.int64)[8 : 8 + 8 * len(machine.lanes) : 8]
    assert set(done.tolist()) == {machine.work.lane_words[0].item()}
    machine.words[STOP] = 1
    for lane in machine.lanes:
        lane.join()
    # Done in time, late, handed nothing, handed again: each is told of the layer before.
    for generation, told in ((1, [1, 0]), (1, [1, 1]), (2, [0, 0]), (2, [1, 1])):
        machine.work.read.zero_()
        machine.handed = Handed(share, generation, 1_000_000)
        check_layer(machine)
        assert machine.work.read[stamps].tolist() == told
