# SPDX-License-Identifier: Apache-2.0
"""A layer of the decode kernels with CPU lanes; for emulated kernels and those of a GPU."""

from threading import Thread

import numpy as np
import torch

from tests.decode_machine import check_layer
from vllm_retrieval_attn.device.board import BoardLayout, board_of
from vllm_retrieval_attn.device.decode_step import Handed
from vllm_retrieval_attn.device.lane_loop import STOP, lane_memory, serve
from vllm_retrieval_attn.index.rows import DTYPE_CODES, memory_of


def start_lanes(machine):
    """Threads that do what the board of the machine says, until its words say stop."""
    g, count = machine.geometry, machine.kernels.buffers.lanes
    memory = machine.arena.transpose(0, 1).view(torch.uint8).numpy()
    rows, board = memory_of(memory, DTYPE_CODES[g.dtype]), board_of(machine.board.numpy())
    for lane in range(count):
        mine = lane_memory(g.group, g.dim), lane, count, np.float32(g.scale), machine.words, 10**11, 1
        machine.lanes.append(Thread(target=serve, args=(board, BoardLayout(g).places, rows, *mine), daemon=True))
        machine.lanes[-1].start()


def check_lanes(machine, share):
    """A layer whose runs lanes do in part, and one in which they are late: the same, and what is told of it."""
    stamps = slice(-2, None)
    machine.handed = Handed(share, 1, 20_000_000_000)
    start_lanes(machine)
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
