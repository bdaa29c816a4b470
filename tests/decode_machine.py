# SPDX-License-Identifier: Apache-2.0
"""The kernels of a decode step against their NumPy twin, stage by stage: what tests/gpu and tests/unit share."""

from dataclasses import replace

import numpy as np
import torch

from vllm_retrieval_attn.device import decode_twin as twin
from vllm_retrieval_attn.device.decode_kernels import STAMPS, Buffers, parts_of, scratch, scratch_bytes
from vllm_retrieval_attn.device.decode_step import PAGE, RUN, Geometry, StepRow, descriptor_of, items_of
from vllm_retrieval_attn.device.sketch_probe import host_part
from vllm_retrieval_attn.sketch import codes, sampling
from vllm_retrieval_attn.sketch.sampling import TILE
from vllm_retrieval_attn.sketch.space import Space, balanced_for, rotation
from vllm_retrieval_attn.store.managed import ManagedMemory

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LAYER = 1


class Machine:
    """Kernels over random memory: 2 layers, 2 KV heads, batches of at most 4 rows.

    Args:
        kernels: a class as DecodeKernels. device: "cuda", or "cpu" for emulated ones.
    """

    def __init__(self, kernels, device, dim, group, dtype="bfloat16", seed=0, rows=4, entries=20, pages=13):
        self.device = device
        self.geometry = Geometry(
            layers=2, kv_heads=2, group=group, dim=dim, dtype=dtype, rows=rows, entries=entries, host_pages=pages,
            sketch_pages=pages + 1, scale=dim**-0.5, first_head=6,
        )  # fmt: skip
        g = self.geometry
        torch.manual_seed(seed)
        self.random = np.random.default_rng(seed)
        arena = torch.randn(g.layers, g.host_pages, g.kv_heads, PAGE, 2, dim).to(_DTYPES[dtype])
        self.memory = None
        if device == "cuda":
            torch.zeros(1, device=device)  # makes the context that the memory belongs to
            self.memory = ManagedMemory(arena.nbytes, torch.cuda.current_device())
            arena = torch.from_numpy(self.memory.array).view(arena.dtype).view(arena.shape).copy_(arena)
        self.arena = arena.transpose(0, 1)  # as pages lie, layer by layer
        blocks = (g.sketch_pages, g.layers, g.kv_heads, g.block_bytes)
        self.sketch = torch.zeros(blocks, dtype=torch.uint8, device=device)
        self.spaces = [self._space(which) for which in (0, 1)]
        parts = [
            torch.from_numpy(np.stack([[[getattr(space, name)] * g.kv_heads] * g.layers for space in self.spaces]))
            for name in ("mean", "keys", "queries")
        ]
        self.descriptor = torch.zeros(g.descriptor_numbers, dtype=torch.int64, device=device)
        buffers = Buffers(self.arena.data_ptr(), self.sketch, *self.to(*parts), self.descriptor)
        self.work = scratch(g, device)
        assert self.work.bytes == scratch_bytes(g)
        self.kernels = kernels(g, buffers, self.work)

    def _space(self, which):
        dim = self.geometry.dim
        if which == 0:
            turn = rotation(dim).astype(np.float32)
            return Space(np.zeros(dim, np.float32), turn, turn)
        mixing = self.random.standard_normal((dim, dim)) / dim**0.5
        keys = self.random.standard_normal((2000, dim)) @ mixing + 0.3
        return balanced_for(keys, self.random.standard_normal((500, dim))).one(0)

    def close(self):
        self.wait()
        if self.memory is not None:
            self.memory.close()

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def to(self, *parts):
        """Tensors or arrays on the device, contiguous."""
        return [torch.as_tensor(part).to(self.device).contiguous() for part in parts]

    def coordinates(self, keys, space):
        return codes.coordinates(keys, self.spaces[space])

    def fill_sketch(self, rows):
        """Code all tokens of the rows' pages, by the encode kernel."""
        g = self.geometry
        for row in rows:
            for host, page in zip(row.host_pages, row.sketch_pages, strict=True):
                for layer in range(g.layers):
                    keys = self.arena[host, layer, :, :, 0].float().numpy()
                    places = np.stack([self.coordinates(keys[h], row.space) for h in range(g.kv_heads)], 1)
                    targets = torch.stack((torch.full((PAGE,), page), torch.arange(PAGE)), 1)
                    self.kernels.encode(layer, *self.to(places, targets))
                    self.wait()

    def inputs(self):
        g, dtype = self.geometry, _DTYPES[self.geometry.dtype]
        heads = g.kv_heads * g.group
        query = (torch.randn(g.rows, heads, g.dim) * 2.5).to(dtype)
        key, value = (torch.randn(g.rows, g.kv_heads, g.dim).to(dtype) for _ in range(2))
        out = torch.randn(g.rows, heads, g.dim).to(dtype)
        lse = torch.randn(heads, g.rows) + 5
        lse[0, 0], lse[1 % heads, 1] = torch.inf, -torch.inf
        return self.to(query, key, value, out, lse)

    def run(self, rows, inputs):
        query, key, value, out, lse = inputs
        self.descriptor.copy_(torch.from_numpy(descriptor_of(rows, self.geometry)))
        self.kernels.before(LAYER, key, value, query)
        self.kernels.after(LAYER, query, out, lse)
        self.wait()


def batch(geometry, random, spaces=(0, 1)):
    """Four rows: a long one that also writes, one without host tokens that writes, one below its limit, one more."""
    hosts, sketches = random.permutation(geometry.host_pages), random.permutation(geometry.sketch_pages)
    tokens = (4 * PAGE + 300, 0, 700, 3 * PAGE)
    writes = (5 * PAGE - 1, 3, -1, 3 * PAGE)
    limits = (200, 50, 800, 64)
    rows, at = [], 0
    for number, pages in enumerate((5, 1, 1, 4)):
        own = slice(at, at + pages)
        rows.append(
            StepRow(
                tokens[number], writes[number], 9000 + number, limits[number], (1e-3, 1e-3, 0.0, 0.0)[number],
                12345 - 7 * number, spaces[number % 2], hosts[own].tolist(), sketches[own].tolist(),
            )
        )  # fmt: skip
        at += pages
    return rows


def expected(machine, rows, number, head, inputs, lse):
    """Check every stage of one (row, KV head); returns rows, log pi and the output (G, d)."""
    g, work, row = machine.geometry, machine.work, rows[number]
    query, _, _, out, _ = inputs
    mine = slice(head * g.group, (head + 1) * g.group)
    asked = query[number, mine].float().cpu().numpy()
    outside = lse[mine, number].cpu().numpy()
    pages = -(-row.tokens // PAGE)
    items = items_of(rows, number, head, g)
    items = slice(items.start, items.start + pages)
    if row.tokens > row.limit:
        ids, log_pi = expected_choice(machine, row, number, head, asked, outside, items)
    else:
        ids, log_pi = twin.choose_all(row.tokens)
    taken = np.unpackbits(work.taken[items].cpu().numpy().reshape(-1, 1), axis=1, bitorder="little")[:, :4].reshape(-1)
    np.testing.assert_array_equal(np.flatnonzero(taken), ids)
    runs = slice(items.start // RUN, items.start // RUN + -(-pages // RUN))
    assert work.counts[runs].cpu().tolist() == np.bincount(ids // (RUN * PAGE), minlength=-(-pages // RUN)).tolist()
    host = machine.arena[list(row.host_pages)[:pages], LAYER, head].float().numpy()
    keys, values = (host[:, :, i].reshape(-1, g.dim) for i in (0, 1))
    more, more_lse = sampling.attend(keys, values, asked, g.scale, ids, log_pi)
    merged = twin.merge(out[number, mine].float().cpu().numpy(), outside, more, more_lse)
    return ids, log_pi, merged


def expected_choice(machine, row, number, head, asked, outside, items):
    g, work = machine.geometry, machine.work
    pages = items.stop - items.start
    want = twin.query_digits(asked, machine.spaces[row.space], g.scale, g.padded)
    raw = work.asked[number, head].cpu().numpy()
    found = twin.Asked(
        work.digits[number, head].cpu().numpy(), np.ascontiguousarray(raw[:, 0]).view(np.float32),
        np.ascontiguousarray(raw[:, 1]).view(np.float32), raw[:, 2].astype(np.int64),
    )  # fmt: skip
    np.testing.assert_allclose(found.unit, want.unit, rtol=1e-5)
    np.testing.assert_allclose(found.bias, want.bias, atol=1e-4)
    pairs = (a.digits.reshape(-1, 2, g.padded)[: g.group].astype(int) for a in (found, want))
    whole = [254 * pair[:, 0] + pair[:, 1] for pair in pairs]
    assert np.abs(whole[0] - whole[1]).max() <= 2
    np.testing.assert_array_equal(found.centre, 15 * whole[0].sum(1))
    blocks = machine.sketch[list(row.sketch_pages)[:pages], LAYER, head].cpu().numpy()
    scored = twin.score_pages(found, *twin.blocks_of(blocks, g.key_bytes), row.tokens)
    there = -(-row.tokens // TILE)
    scores = work.scores[items].cpu().numpy().reshape(-1, g.group, TILE)[:there]
    np.testing.assert_array_equal(scores, scored.scores.reshape(-1, g.group, TILE)[:there])
    np.testing.assert_array_equal(work.tops[items].cpu().numpy(), scored.tops)
    np.testing.assert_array_equal(work.records[items].cpu().numpy(), scored.records)
    shares = twin.whole_attention(scored.records, outside)
    np.testing.assert_array_equal(work.shares[number, head].cpu().numpy(), shares)
    weights = twin.weights_of(scored, shares)
    bins = twin.histogram(weights[: row.tokens], row.tau)
    np.testing.assert_array_equal(work.bins[number, head].cpu().numpy(), bins)
    tau = twin.raised_tau(bins, row.limit, row.tau)
    assert work.taus[number, head].item() == tau
    seed = sampling.seed_of(row.seed, row.position, LAYER, g.first_head + head)
    return twin.choose(weights, row.tokens, tau, seed)


SHAPES = [
    (64, 1), (64, 4), (64, 5), (64, 12), (80, 1), (80, 3), (80, 8), (96, 4), (96, 9), (128, 1), (128, 4), (128, 6),
    (128, 8), (128, 12), (256, 1), (256, 4), (256, 8), (256, 12),
]  # fmt: skip


def check_layer(machine):
    """All stages of a layer over a batch."""
    rows = batch(machine.geometry, machine.random)
    machine.fill_sketch(rows)
    inputs = machine.inputs()
    arena, sketch = machine.arena.clone(), machine.sketch.clone().cpu()
    before = inputs[3].clone()
    machine.run(rows, inputs)
    check_written(machine, rows, inputs, arena, sketch)
    given = (*inputs[:3], before, inputs[4])
    ids, log_pi, counts = (part.cpu().numpy() for part in machine.kernels.chosen(5000))
    total = np.zeros(len(rows), int)
    for number in (0, 2, 3):
        for head in range(machine.geometry.kv_heads):
            want = expected(machine, rows, number, head, given, inputs[4])
            total[number] += len(want[0])
            assert counts[number, head] == len(want[0])
            np.testing.assert_array_equal(ids[number, head, : len(want[0])], want[0])
            np.testing.assert_allclose(log_pi[number, head, : len(want[0])], want[1], atol=1e-5)
            mine = slice(head * machine.geometry.group, (head + 1) * machine.geometry.group)
            got = inputs[3][number, mine].float().cpu().numpy()
            np.testing.assert_allclose(got, want[2], atol=2e-2, rtol=2e-2)
    assert torch.equal(inputs[3][1], before[1])
    read = machine.work.read.cpu()
    assert read[: len(total)].tolist() == total.tolist()
    assert not read[len(total) : -STAMPS].any()
    check_stamps(read[-STAMPS:].numpy(), layers=1)


def check_stamps(stamps, layers):
    """Every part began after the one before it, in that many layers, and none took a minute."""
    assert stamps[0] == layers
    parts = parts_of(stamps)
    assert list(parts) == ["write", "score", "weigh", "gather", "merge"]
    assert all(0 <= seconds < 60 for seconds in parts.values())
    assert sum(parts.values()) > 0


def check_written(machine, rows, inputs, arena, sketch):
    """The new tokens' K, V and codes are there, and nothing else changed."""
    g = machine.geometry
    _, key, value, _, _ = inputs
    after = machine.sketch.cpu()
    for number, row in enumerate(rows):
        if row.write < 0:
            continue
        host, page, token = row.host_pages[row.write // PAGE], row.sketch_pages[row.write // PAGE], row.write % PAGE
        arena[host, LAYER, :, token, 0], arena[host, LAYER, :, token, 1] = key[number].cpu(), value[number].cpu()
        for head in range(g.kv_heads):
            places = machine.coordinates(key[number, head][None].float().cpu().numpy(), row.space)
            packed, step = twin.encode_places(places, g.padded)
            block, mine = after[page, LAYER, head], slice(token * g.key_bytes, (token + 1) * g.key_bytes)
            found, found_steps = twin.blocks_of(block[None].numpy(), g.key_bytes)
            levels = [np.concatenate((c & 15, c >> 4)).astype(int) for c in (packed[0], found[0, token])]
            assert (levels[0] != levels[1]).mean() <= 0.05
            assert np.abs(levels[0] - levels[1]).max() <= 1
            np.testing.assert_allclose(found_steps[0, token].astype(float), step[0].astype(float), rtol=2e-3)
            size = slice(PAGE * g.key_bytes + 2 * token, PAGE * g.key_bytes + 2 * token + 2)
            for changed in (mine, size):
                sketch[page, LAYER, head, changed] = block[changed]
    assert torch.equal(after, sketch)
    assert torch.equal(machine.arena, arena)


def check_layers_written(machine):
    """Keys and values of all layers, taken from paged caches, are where and as layer after layer would write them."""
    g, block, blocks = machine.geometry, 16, 9
    rows = batch(g, machine.random)
    caches = [torch.randn(blocks, g.kv_heads, block, 2 * g.dim).to(_DTYPES[g.dtype]) for _ in range(g.layers)]
    slots = [torch.from_numpy(machine.random.permutation(blocks * block)[: g.rows]) for _ in range(g.layers)]
    slots[0][0] = -1  # as for a row of padding
    rows[3] = replace(rows[3], write=-1)
    machine.descriptor.copy_(torch.from_numpy(descriptor_of(rows, g)))
    machine.fill_sketch(rows)
    fresh = machine.arena.clone(), machine.sketch.clone()
    for layer, (cache, mine) in enumerate(zip(caches, slots, strict=True)):
        tokens = cache[mine // block, :, mine % block]
        parts = machine.to(tokens[..., : g.dim], tokens[..., g.dim :], machine.inputs()[0])
        machine.kernels.write(layer, *parts)
    machine.wait()
    want = machine.arena.clone(), machine.sketch.clone()
    host, page, token = rows[0].host_pages[rows[0].write // PAGE], rows[0].sketch_pages[-1], rows[0].write % PAGE
    want[0][host, 0, :, token] = fresh[0][host, 0, :, token]
    want[1][page, 0] = fresh[1][page, 0]
    machine.arena.copy_(fresh[0])
    machine.sketch.copy_(fresh[1])
    machine.kernels.write_layers(machine.to(*caches), machine.to(*slots))
    machine.wait()
    assert torch.equal(machine.arena, want[0])
    assert torch.equal(machine.sketch, want[1])
    assert not torch.equal(machine.arena, fresh[0])


def check_long_row(machine):
    """A row of 300 pages; the machine has 304 entries, 13 pages, 2 query heads."""
    pages = [page % 13 for page in range(300)]
    first = StepRow(0, -1, 1, 1, 1e-3, 3, 1, range(13), range(13))
    machine.fill_sketch([first])
    row = StepRow(299 * PAGE + 5, -1, 400_000, 700, 1e-4, 3, 1, pages, pages)
    rows, inputs = [replace(first, host_pages=(), sketch_pages=()), row], machine.inputs()
    before = inputs[3].clone()
    machine.run(rows, inputs)
    for head in (0, 1):
        want = expected(machine, rows, 1, head, (*inputs[:3], before, inputs[4]), inputs[4])[2]
        got = inputs[3][1, 2 * head : 2 * head + 2].float().cpu().numpy()
        np.testing.assert_allclose(got, want, atol=2e-2, rtol=2e-2)


def check_codes(machine):
    """Codes of a prefill chunk; head size 80, group 2."""
    places = machine.random.standard_normal((500, 2, 80)).astype(np.float32)
    targets = np.stack((np.arange(500) % 3, machine.random.permutation(PAGE)[:500]), 1)
    targets[7] = -1, 0
    targets[9] = 3000, 0
    machine.kernels.encode(0, *machine.to(places, targets))
    sketch = machine.sketch.cpu().numpy()
    for head in (0, 1):
        packed, steps = twin.encode_places(places[:, head], 128)
        found, found_steps = twin.blocks_of(sketch[:, 0, head], 64)
        inside = [t for t in range(500) if t not in (7, 9)]
        page, token = targets[inside].T
        got = found_steps[page, token].astype(float)
        np.testing.assert_allclose(got, steps[inside].astype(float), rtol=2e-3)
        same = got == steps[inside]
        assert same.mean() > 0.99
        np.testing.assert_array_equal(found[page, token][same], packed[inside][same])
    assert (found_steps != 0).sum() == 498


def check_missing_pages(machine):
    """Pages that do not exist are skipped."""
    good = batch(machine.geometry, machine.random)
    machine.fill_sketch(good)
    bad = [
        replace(good[0], host_pages=[10**9, *good[0].host_pages[1:]], write=100),
        replace(good[1], sketch_pages=[-5]),
        replace(good[2], host_pages=[-1]),
        replace(good[3], sketch_pages=[10**12] * 4),
    ]
    inputs = machine.inputs()
    before = inputs[3].clone()
    machine.run(bad, inputs)
    taken = machine.work.taken.cpu()
    assert taken[items_of(bad, 0, 0, machine.geometry)][0].sum() == 0
    assert taken[items_of(bad, 0, 0, machine.geometry)][1:5].sum() > 0
    assert taken[items_of(bad, 3, 0, machine.geometry)][:3].sum() == 0
    assert torch.equal(inputs[3][1:], before[1:])
    assert inputs[3].isfinite().all()


def check_host_part(machine):
    """What is read back of a row alone is its attention to the rows read, and those."""
    g = machine.geometry
    rows = batch(g, machine.random)
    machine.fill_sketch(rows)
    inputs = machine.inputs()
    machine.run(rows, inputs)
    for number in (0, 2):
        row = rows[number]
        found = host_part(machine.kernels, rows, number)
        ids, log_pi, counts = machine.kernels.chosen(row.tokens)
        for head in range(g.kv_heads):
            count = int(counts[number, head])
            read = ids[number, head, :count].cpu().numpy()
            np.testing.assert_array_equal(found.chosen[head], read)
            host = machine.arena[list(row.host_pages), LAYER, head].float().numpy()
            keys, values = (host[:, :, i].reshape(-1, g.dim) for i in (0, 1))
            mine = slice(head * g.group, (head + 1) * g.group)
            asked = inputs[0][number, mine].float().cpu().numpy()
            of = log_pi[number, head, :count].cpu().numpy()
            out, lse = sampling.attend(keys, values, asked, g.scale, read, of)
            np.testing.assert_allclose(found.out[mine], out, atol=2e-3, rtol=2e-3)
            np.testing.assert_allclose(found.lse[mine], lse, atol=2e-3)


def check_fetched(machine):
    """Pages of a layer, copied to the device; one that does not exist comes as zeros."""
    g = machine.geometry
    pages = [3, 0, g.host_pages, 7, -1]
    out = torch.full((len(pages), g.kv_heads, PAGE, 2, g.dim), 9.0, dtype=machine.arena.dtype, device=machine.device)
    machine.kernels.fetch(LAYER, *machine.to(torch.tensor(pages)), out)
    machine.wait()
    for number, page in enumerate(pages):
        there = 0 <= page < g.host_pages
        wanted = machine.arena[page, LAYER] if there else torch.zeros_like(machine.arena[0, LAYER])
        assert torch.equal(out[number].cpu(), wanted)
