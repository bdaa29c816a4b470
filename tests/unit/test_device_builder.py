"""The builder that the vLLM worker runs itself: the same slabs as the CPU workers', on whatever device."""

import threading
import time

import numpy as np
import pytest
import torch

from tests.unit.indexed_ring import IndexedRing, layout
from vllm_retrieval_attn.attention import cuda_builder
from vllm_retrieval_attn.attention.cuda_builder import DeviceBuilder
from vllm_retrieval_attn.attention.slab_copier import SlabCopier
from vllm_retrieval_attn.store.layout import ACTOR_JOBS, WORD_JOBS


class DeviceRing(IndexedRing):
    """Builds with a DeviceBuilder."""

    def __init__(self, shape, dtype="float32", device="cpu", layers_at_once=1):
        super().__init__(shape, dtype)
        self.device = DeviceBuilder(shape, self.views, self.pages, torch.device(device), self.scale, 0.0)
        self.device.layers_at_once = layers_at_once
        self.index.device_builder = self.device

    def run_builders(self):
        deadline = time.monotonic() + 120
        while self.index.pending and time.monotonic() < deadline:
            self.index.poll()
            time.sleep(0.002)

    def close(self):
        self.device.stop()
        self.device._views = self.device._pages = self.device._work = None
        self.index.device_builder = None
        super().close()


def slabs_of(ring, statistics):
    message, _ = ring.fill(1, [700, 300], 4)
    ring.pages[:, 0] = torch.randn(ring.pages[:, 0].shape, generator=torch.Generator().manual_seed(2)).to(
        ring.pages.dtype
    )
    ring.fill_statistics = lambda: None
    ring.views.statistics[:] = statistics
    ring.index_rows(message)
    lay = ring.layout
    found = []
    for store in ring.stores:
        for slab in store.slabs.values():
            begin = lay.slabs_offset - lay.turns_offset + slab * lay.segment_slab_bytes
            found.append(ring.views.index8[begin : begin + lay.segment_slab_bytes].copy())
    jobs = int(ring.views.words[ring.views.actor_word(0, ACTOR_JOBS)])
    return np.stack(found), ring.views.index16[: (lay.slabs_offset - lay.turns_offset) // 2].copy(), jobs


@pytest.fixture
def statistics():
    shape = layout(kv_heads=2, group=2, dim=16, dtype="bfloat16")
    random = np.random.default_rng(3)
    rows = random.standard_normal((shape.max_rows, LAYERS, 2, shape.head_statistics)).astype(np.float32)
    half = rows[..., :256].reshape(shape.max_rows, LAYERS, 2, 16, 16)
    rows[..., :256] = (half @ half.swapaxes(-1, -2)).reshape(*rows.shape[:3], 256)
    rows[..., -8:] += 8  # LSE
    return rows


LAYERS = 2


@pytest.mark.parametrize("layers_at_once", [1, 2])
def test_the_slabs_are_those_of_the_cpu_workers(statistics, layers_at_once):
    shape = layout(kv_heads=2, group=2, dim=16, dtype="bfloat16")
    ring = IndexedRing(shape, "bfloat16")
    try:
        want, want_turns, jobs = slabs_of(ring, statistics)
        assert jobs == ring.views.words[WORD_JOBS] == 3
    finally:
        ring.close()
    ring = DeviceRing(shape, "bfloat16", layers_at_once=layers_at_once)
    try:
        got, got_turns, jobs = slabs_of(ring, statistics)
        assert jobs == 0
    finally:
        ring.close()
    np.testing.assert_array_equal(got_turns, want_turns)
    assert (got != want).mean() < 1e-3  # sums over another batch shape may round differently


def test_a_build_whose_request_ended_is_dropped():
    ring = DeviceRing(layout(kv_heads=1, dim=16))
    try:
        message = fillable(ring)
        begun = []
        build_layers = ring.device._work.build_layers
        ring.device._work.build_layers = lambda *given: begun.append(given) or build_layers(*given)
        ring.device.post(5, int(message[0, 0]), 0, 3, 0)  # no slab has generation 5
        pass_queue(ring.device)
        assert begun == []
        assert ring.device.busy == set()
        assert (ring.views.built == 0).all()
        assert ring.device.is_alive()
    finally:
        ring.close()


@pytest.mark.parametrize("last", [0, 1])  # of two layers
def test_a_build_whose_request_ends_meanwhile_is_not_marked_and_its_slab_busy_until_nothing_is_written(last):
    ring = DeviceRing(layout(kv_heads=1, dim=16))
    go, slab = threading.Event(), 3
    write, build_layers = ring.device._work.write, ring.device._work.build_layers

    def late(starts, slabs):
        assert go.wait(60)
        write(starts, slabs)

    def ending(layers, *given):
        build_layers(layers, *given)
        if last in layers:
            ring.views.generations[slab] = 0

    ring.device._copier._write, ring.device._work.build_layers = late, ending
    try:
        message = fillable(ring)
        ring.views.generations[slab] = 5
        ring.device.post(5, int(message[0, 0]), 0, slab, 0)
        wait_for(lambda: ring.views.generations[slab] == 0)  # what is built by now is on its way
        time.sleep(0.1)
        assert ring.device.busy == {slab}
        go.set()
        pass_queue(ring.device)
        wait_for(lambda: ring.device.busy == set())
        assert (ring.views.built == 0).all()
    finally:
        go.set()
        ring.close()


@pytest.mark.parametrize(
    ("error", "tries", "told"),
    [
        (torch.OutOfMemoryError("full"), [2, 1], "too little GPU memory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), [2], "CPU workers build from now on"),
    ],
)
def test_what_fails_on_the_device_is_built_by_the_cpu_workers(caplog, error, tries, told):
    shape = layout(kv_heads=2, group=2, dim=16, dtype="bfloat16")
    ring = DeviceRing(shape, "bfloat16", layers_at_once=2)
    tried = []

    def build_layers(layers, *_):
        tried.append(len(layers))
        raise error

    ring.device._work.build_layers = build_layers
    for builder in ring.builders:
        builder.start()
    try:
        message, _ = ring.fill(1, [700, 300], 4)
        ring.pages[:, 0] = 0.0
        with caplog.at_level("WARNING", logger="vllm.retrieval"):
            ring.index_rows(message)  # sees that every full segment is indexed
        assert tried == tries
        assert int(ring.views.words[ring.views.actor_word(0, ACTOR_JOBS)]) == 3
        assert caplog.text.count(told) == 1
    finally:
        ring.close()


@pytest.mark.parametrize(("share", "layers"), [(0.9, 0), (2.0, 2), (3.0, 3), (4.0, 4), (6.0, 4), (7.0, 7), (99.0, 7)])
def test_as_many_layers_are_built_at_once_as_memory_allows_in_equal_parts(share, layers):
    shape = layout(kv_heads=2, dim=128)
    shape = type(shape)(**{**vars(shape), "layers": 7})
    builder = DeviceBuilder.__new__(DeviceBuilder)
    builder._layout = shape
    layer_bytes = 6 * 4 * 2 * shape.segment_tokens * 128
    assert builder._layers_in(int(share * layer_bytes / cuda_builder.FREE_SHARE)) == layers


def test_a_warm_up_builds_what_belongs_to_nothing():
    ring = DeviceRing(layout(kv_heads=2, group=2, dim=16, dtype="bfloat16"), "bfloat16", layers_at_once=2)
    try:
        before = ring.views.index8.copy()
        built = []
        rehearse = ring.device._work.rehearse
        ring.device._work.rehearse = lambda rows: built.append(rehearse(rows)) or built[-1]
        ring.device.warm_up()
        assert built[0].shape == (4, ring.layout.slab_bytes)  # 2 layers, 2 KV heads
        assert built[0].view(torch.float64)[:, 0].eq(1).all()  # HEAD_STATE: whole
        np.testing.assert_array_equal(ring.views.index8, before)
        assert ring.device.busy == set()
    finally:
        ring.close()


def test_a_warm_up_that_fails_leaves_builds_to_the_cpu_workers(caplog):
    ring = DeviceRing(layout(kv_heads=2, group=2, dim=16, dtype="bfloat16"), "bfloat16", layers_at_once=2)
    try:

        def rehearse(rows):
            raise RuntimeError("no kernel image is available")

        ring.device._work.rehearse = rehearse
        ring.device.warm_up()
        assert "CPU workers build from now on" in caplog.text
        assert "ready" not in caplog.text
        for builder in ring.builders:
            builder.start()
        message, _ = ring.fill(1, [700, 300], 4)
        ring.pages[:, 0] = 0.0
        ring.index_rows(message)  # sees that every full segment is indexed
        assert int(ring.views.words[ring.views.actor_word(0, ACTOR_JOBS)]) == 3
    finally:
        ring.close()


def test_a_slab_is_busy_until_its_copy_home_has_landed():
    ring = DeviceRing(layout(kv_heads=1, dim=16))
    go, write, slab = threading.Event(), ring.device._work.write, 3

    def late(starts, slabs):
        assert go.wait(60)
        write(starts, slabs)

    ring.device._copier._write = late
    try:
        message = fillable(ring)
        ring.views.generations[slab] = 5
        ring.device.post(5, int(message[0, 0]), 0, slab, 0)
        pass_queue(ring.device)
        assert ring.device.busy == {slab}
        assert not (ring.views.built[slab] == 5).any()
        go.set()
        wait_for(lambda: ring.device.busy == set())
        assert (ring.views.built[slab] == 5).all()
    finally:
        go.set()
        ring.close()


def test_a_copier_reuses_a_buffer_only_when_it_is_home():
    go, got = threading.Event(), {}

    def write(starts, slabs):
        assert go.wait(60)
        got.update(zip(starts, slabs.clone(), strict=True))

    copier = SlabCopier(write, torch.device("cpu"))
    slabs = [torch.full((5, 8), number, dtype=torch.uint8) for number in range(3)]
    third = threading.Thread(target=lambda: [copier([10 * i + j for j in range(5)], slabs[i]) for i in range(3)])
    try:
        third.start()
        wait_for(lambda: len(copier._since) == 2)
        time.sleep(0.1)
        assert len(copier._since) == 2  # both buffers are taken
        go.set()
        third.join(60)
        told = []
        copier.then(told.append)
        wait_for(lambda: told == [None])
        assert {start: set(slab.tolist()) for start, slab in got.items()} == {
            10 * i + j: {i} for i in range(3) for j in range(5)
        }
    finally:
        go.set()
        copier.close()


def test_a_copy_home_that_fails_is_built_by_the_cpu_workers(caplog):
    ring = DeviceRing(layout(kv_heads=2, group=2, dim=16, dtype="bfloat16"), "bfloat16", layers_at_once=2)

    def lost(starts, slabs):
        raise OSError("no space")

    ring.device._copier._write = lost
    for builder in ring.builders:
        builder.start()
    try:
        message, _ = ring.fill(1, [700, 300], 4)
        ring.pages[:, 0] = 0.0
        ring.index_rows(message)  # sees that every full segment is indexed
        assert int(ring.views.words[ring.views.actor_word(0, ACTOR_JOBS)]) == 3
        assert "CPU workers build from now on" in caplog.text
    finally:
        ring.close()


def fillable(ring):
    """A request of one segment whose rows are numbers in all layers."""
    ring.fill_statistics()
    message, _ = ring.fill(1, [300], 1)
    ring.pages[:, 0] = 0.0
    return message


def pass_queue(builder):
    """Wait until the builder has done all that was queued."""
    passed = threading.Event()
    builder._queue.put(passed.set)
    assert passed.wait(60)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
