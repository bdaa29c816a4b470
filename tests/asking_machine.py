# SPDX-License-Identifier: Apache-2.0
"""Steps in which a graph asks CPU workers, against brute force: what tests/gpu and tests/unit share.

The kernels are the product's, on a GPU or emulated, and so are shared file, client and workers, as threads of the test.
"""

import threading
import time
from types import SimpleNamespace

import numpy as np
import torch

from tests.unit.layouts import DTYPES, make_layout
from tests.unit.rings import Ring
from vllm_retrieval_attn.device.ask_kernels import TOLD_MISSED, AskKernels
from vllm_retrieval_attn.device.asking import Asking
from vllm_retrieval_attn.store.layout import (
    MSG_ROWS,
    MSG_STEP,
    ROW_INDEXED,
    ROW_TABLE,
    SLOT_GENERATION,
    WORD_AWAKE,
    WORD_GIVEN_UP,
)

TOLERANCE = {"bfloat16": 0.03, "float16": 0.004}


class AskingMachine:
    """A ring, kernels over it, and random layers of a model.

    Args:
        kernels: a class as AskKernels. device: "cuda", or "cpu" for emulated ones. limit_s: for an answer.
    """

    def __init__(self, kernels=AskKernels, device="cpu", dtype="bfloat16", limit_s=60.0, **shape):
        self.device, self.dtype = device, DTYPES[dtype]
        self.tolerance = TOLERANCE[dtype]
        shape = {"kv_heads": 2, "group": 4, "dim": 64, "layers": 3, **shape}
        self.ring = Ring(make_layout(dtype, **shape), dtype, scale=shape["dim"] ** -0.5)
        self.layout, self.client = self.ring.layout, self.ring.client
        self.pinner = None
        if device == "cuda":
            from vllm_retrieval_attn.store.pinning import Pinner

            torch.zeros(1, device=device)
            views, lay = self.ring.views, self.layout
            self.pinner = Pinner(int(views.words.ctypes.data) - lay.parts["words"][0], lay)
        self.kernels = kernels(self.layout, self.ring.views, self.ring.scale, torch.device(device))
        self.asking = Asking(self.layout, self.client, self.kernels, limit_s)

    def close(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.pinner.close()
        self.ring.close()

    def fill(self, tokens, seed=0, indexed=None, rows=64):
        """Random rows of all layers: the message, and K/V of each layer and row in float64."""
        lay, ring = self.layout, self.ring
        message, first = ring.fill(0, tokens, seed, indexed, rows)
        stored = [first]
        for layer in range(1, lay.layers):
            stored.append([])
            for row, count in zip(message, tokens, strict=True):
                kv = torch.randn(lay.kv_heads, count, 2, lay.dim).to(self.dtype)
                for number in range(lay.page_tokens_owned(count)):
                    page = int(ring.views.tables[row[ROW_TABLE], number])
                    part = kv[:, number * lay.page_tokens : (number + 1) * lay.page_tokens]
                    ring.pages[page, layer, :, : part.shape[1]] = part
                stored[-1].append(kv.double())
        return message, stored

    def plan(self, message, tokens=None, late=False):
        """A step of these rows: row r is batch token ``tokens[r]``; token 0 goes to the host as well."""
        rows = len(message)
        free = sorted(set(range(self.layout.pages)) - set(self.ring.views.tables.reshape(-1).tolist()))
        self.target = free[0], self.layout.page_tokens - 1
        return SimpleNamespace(
            mirror_tokens=np.array([0]), mirror_pages=np.array([self.target[0]]),
            mirror_offsets=np.array([self.target[1]]), decode_rows=message, attends_here=late,
            decode_tokens=np.array(range(rows) if tokens is None else tokens),
            decode_ids=[f"request {row}" for row in range(rows)],
        )  # fmt: skip

    def inputs(self, batch):
        lay = self.layout
        query = torch.randn(batch, lay.heads, lay.dim) * 2
        key, value = torch.randn(2, batch, lay.kv_heads, lay.dim)
        out, lse = torch.randn(batch, lay.heads, lay.dim), torch.randn(lay.heads, batch) + 3
        lse[0, 0] = torch.inf  # FlashAttention's way to say that there are no keys
        query, key, value, out = (part.to(self.dtype).to(self.device) for part in (query, key, value, out))
        return (query, key, value), out, lse.to(self.device)

    def step(self, plan, batch=None, before=lambda layer: None):
        """Run a step; returns inputs and outputs of its layers, and its outcome."""
        layers = [self.inputs(batch or len(plan.decode_ids)) for _ in range(self.layout.layers)]
        paged = [(out.clone(), lse.clone()) for _, out, lse in layers]
        self.asking.open(plan)
        for layer, (inputs, out, lse) in enumerate(layers):
            before(layer)
            self.kernels.layer(layer, inputs, out, lse)
        self.asking.sent()
        return layers, paged, self.asking.close()

    def wanted(self, layer, paged, stored, query, tokens):
        """Exact attention of each row, merged with its paged part; others as they were."""
        lay = self.layout
        out, lse = (part.double().cpu() for part in paged)
        lse[lse == torch.inf] = -torch.inf
        found = out.clone()
        for row, token in enumerate(tokens):
            for head in range(lay.heads):
                kv = stored[layer][row][head // lay.group]
                scores = kv[:, 0] @ query[token, head].double().cpu() * self.ring.scale
                whole = torch.logaddexp(torch.logsumexp(scores, 0), lse[head, token])
                found[token, head] = torch.exp(scores - whole) @ kv[:, 1]
                if lse[head, token] > -torch.inf:
                    found[token, head] += torch.exp(lse[head, token] - whole) * out[token, head]
        return found

    def check(self, layers, paged, stored, tokens):
        """All layers' outputs are exact attention's."""
        for layer, ((query, key, value), out, _) in enumerate(layers):
            want = self.wanted(layer, paged[layer], stored, query, tokens)
            torch.testing.assert_close(out.double().cpu(), want, atol=self.tolerance, rtol=self.tolerance)
            page, offset = self.target
            for written, part in enumerate((key, value)):
                assert torch.equal(self.ring.pages[page, layer, :, offset, written], part[0].cpu())


def check_answers(machine):
    """Rows anywhere in the batch, of pages and parts of pages, two steps in a row."""
    machine.ring.start_all()
    for seed, (counts, tokens, batch) in enumerate([([300, 1, 64], [3, 0, 2], 5), ([17], [0], 1)]):
        message, stored = machine.fill(counts, seed)
        layers, paged, outcome = machine.step(machine.plan(message, tokens), batch)
        machine.check(layers, paged, stored, tokens)
        assert (outcome.late, outcome.missed, outcome.failed) == (False, 0, [])
        assert outcome.waited_s > 0
        read = machine.ring.views.read[: len(counts)]
        assert read.tolist() == [[machine.layout.layers * count] * machine.layout.kv_heads for count in counts]
        over(machine)


def over(machine):
    """Nobody is kept awake, and who comes back finds nothing to do."""
    views = machine.ring.views
    assert views.words[WORD_AWAKE] == 0
    assert (views.header[MSG_STEP], views.header[MSG_ROWS]) == (0, 0)
    assert machine.asking.close() is None


def check_searched(machine):
    """A step asks for what messages of single layers ask for, and finds the same."""
    ring, lay = machine.ring, machine.layout
    ring.start_all()
    message, _ = machine.fill([2048, 1100], 5, indexed=[2048, 1088], rows=40)
    layers, paged, outcome = machine.step(machine.plan(message))
    assert not outcome.late
    read = ring.views.read[:2].copy()
    again = np.zeros_like(read)
    for layer, ((query, _, _), out, _) in enumerate(layers):
        ring.queries[:2] = query.cpu()
        of_pages, lse = (part.double().cpu() for part in paged[layer])
        lse[lse == torch.inf] = -torch.inf
        ring.views.outside[:2] = lse.T.float().numpy()
        found, found_lse = (part.double() for part in ring.ask(layer, message))
        again += ring.views.read[:2]
        whole = torch.logaddexp(lse.T, found_lse)
        want = found * torch.exp(found_lse - whole)[..., None]
        want += torch.where(lse.T[..., None] > -torch.inf, of_pages * torch.exp(lse.T - whole)[..., None], 0)
        torch.testing.assert_close(out.double().cpu(), want, atol=machine.tolerance, rtol=machine.tolerance)
    assert (read == again).all()
    assert (read.sum(1) < lay.layers * lay.kv_heads * np.array([400, 400])).all()


def check_nobody_there(machine):
    """No worker answers: the GPU attends itself, in all layers, and waits but once."""
    counts, tokens = [300, 64 * 6, 5], [1, 0, 2]
    message, stored = machine.fill(counts, 3)
    began = time.monotonic()
    layers, paged, outcome = machine.step(machine.plan(message, tokens), 4)
    took = time.monotonic() - began
    machine.check(layers, paged, stored, tokens)
    assert (outcome.late, outcome.missed) == (True, machine.layout.layers)
    assert took > machine.asking._limit_ns * 1e-9
    over(machine)
    assert not machine.client.idle()  # they still have it to do, and then it asks for nothing
    machine.ring.start_all()
    machine.ring.await_idle()
    layers, paged, outcome = machine.step(machine.plan(message, tokens), 4)
    machine.check(layers, paged, stored, tokens)
    assert not outcome.late
    one, nothing = machine.step(machine.plan(message, tokens, late=True), 4)[2], machine.plan(message[:0], [])
    assert one.late
    assert machine.step(nothing, 4)[2] is None  # a step without rows has nothing that could be late
    assert machine.kernels.told[TOLD_MISSED] == machine.layout.layers


def check_given_up(machine):
    """Whoever sees that workers are gone ends the waiting."""
    message, stored = machine.fill([100], 4)
    plan = machine.plan(message)

    def give_up():
        while not machine.ring.views.header[MSG_STEP]:
            time.sleep(0.01)
        machine.ring.views.words[WORD_GIVEN_UP] = machine.ring.views.header[MSG_STEP]

    other = threading.Thread(target=give_up)
    other.start()
    layers, paged, outcome = machine.step(plan)
    other.join()
    machine.check(layers, paged, stored, [0])
    assert (outcome.late, outcome.missed) == (True, machine.layout.layers)


def check_not_asked(machine):
    """The engine knows before that workers are not to be asked; no message is posted."""
    message, stored = machine.fill([100, 70], 6)
    layers, paged, outcome = machine.step(machine.plan(message, late=True))
    machine.check(layers, paged, stored, [0, 1])
    assert outcome.late
    assert machine.client.idle()


def check_lost_between_layers(machine):
    """Workers end after the first layer: what they answered stays theirs, the rest is the GPU's."""
    ring = machine.ring
    ring.start_all()
    message, stored = machine.fill([200, 90], 7)

    def end(layer):
        if layer == 1:
            if machine.device == "cuda":
                torch.cuda.synchronize()
            ring.stop_lanes()

    layers, paged, outcome = machine.step(machine.plan(message), before=end)
    machine.check(layers, paged, stored, [0, 1])
    assert (outcome.late, outcome.missed) == (True, machine.layout.layers - 1)


def check_a_failed_row(machine):
    """The search of a row whose page table is another's by now fails: the GPU attends to it itself."""
    machine.ring.start_all()
    message, stored = machine.fill([1100, 80], 8)
    message[0, ROW_INDEXED] = 1088
    machine.ring.views.slots[message[0, ROW_TABLE], SLOT_GENERATION] += 1
    layers, paged, outcome = machine.step(machine.plan(message))
    assert outcome.failed == ["request 0"]
    assert (outcome.late, outcome.missed) == (False, 0)
    machine.check(layers, paged, stored, [0, 1])


def check_nothing_to_ask(machine):
    """A step that only writes, and one without anything."""
    message, _ = machine.fill([10], 9)
    plan = machine.plan(message)
    plan.decode_rows, plan.decode_tokens, plan.decode_ids = message[:0], plan.decode_tokens[:0], []
    for step in (plan, None):
        inputs, out, lse = machine.inputs(3)
        before = out.clone()
        machine.asking.open(step)
        assert machine.asking.under_way is None
        machine.kernels.layer(1, inputs, out, lse)
        machine.asking.sent()
        if machine.device == "cuda":
            torch.cuda.synchronize()
        assert torch.equal(out, before)
        assert machine.asking.close() is None
        page, offset = machine.target
        assert torch.equal(machine.ring.pages[page, 1, :, offset, 0], inputs[1][0].cpu()) == (step is plan)
        machine.ring.pages[page, 1] = 0
    assert machine.client.idle()


_SHAPES = (
    {"dim": 128, "group": 4, "dtype": "bfloat16", "actors": 2},
    {"dim": 80, "group": 3, "dtype": "float16"},
    {"dim": 256, "group": 9, "dtype": "bfloat16"},
)
CASES = [
    *((check_answers, shape) for shape in _SHAPES),
    *((check_nobody_there, {**shape, "limit_s": 0.2}) for shape in _SHAPES),
    (check_searched, {"indexed": True, "table_pages": 40, "threads": 2}),
    (check_given_up, {"limit_s": 600.0}),
    (check_not_asked, {"limit_s": 600.0}),
    (check_lost_between_layers, {"limit_s": 0.5}),
    (check_a_failed_row, {"indexed": True, "table_pages": 20}),
    (check_nothing_to_ask, {}),
]
"""Checks, and the machine that each is made for."""
