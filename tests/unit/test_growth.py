# SPDX-License-Identifier: Apache-2.0
"""When indexes may grow over what a step wrote, and who lets them grow."""

import time
from types import SimpleNamespace

import pytest

from tests.unit.layouts import make_layout
from tests.unit.rings import Ring
from vllm_retrieval_attn.plugin.worker import RetrievalWorker
from vllm_retrieval_attn.store.layout import ROW_INDEXED, SLOT_GENERATION, SLOT_INDEXED
from vllm_retrieval_attn.workers.grower import Grower


@pytest.mark.parametrize(
    ("idle", "gave_up", "copied", "grows"),
    [(True, False, True, True), (True, False, False, False), (False, False, True, False), (False, True, True, True)],
)
def test_indexes_grow_once_copies_are_there_and_no_late_message_is_open(idle, gave_up, copied, grows):
    store, allowed = SimpleNamespace(request_id="a"), []
    gone = SimpleNamespace(request_id="b")
    worker = SimpleNamespace(
        client=SimpleNamespace(idle=lambda: idle),
        pool=SimpleNamespace(gave_up=gave_up),
        arena=SimpleNamespace(requests={"a": store}, allow_indexing=lambda *what: allowed.append(what)),
        _growth=[(SimpleNamespace(query=lambda: copied), [(store, 64), (gone, 32)])],
    )
    RetrievalWorker._allow_indexing(worker)
    assert allowed == ([(store, 64)] if grows else [])
    assert len(worker._growth) == (not grows)


def sizes(indexes):
    return {(layer, head): entry.index.size for (_, layer, head), entry in indexes._entries.items()}


def await_true(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


LAYOUT = make_layout(
    kv_heads=2, group=2, dim=64, layers=3, page_tokens=256, table_pages=40, max_rows=3, indexed=True, threads=2
)


def test_a_step_indexes_nothing_before_the_gpu_has_come_to_it():
    """Its last keys may still be on their way until then: what lies in their place is not a number here."""
    ring, step = Ring(LAYOUT), 70
    try:
        message, _ = ring.fill(0, [4000], 3, [2048])
        ring.views.slots[message[0, 0], SLOT_INDEXED] = 0
        desk = ring.desks[0]
        ring.views.header[:] = 0, 1, -1, step
        ring.views.rows[:1] = message
        desk.lay_out(step)
        desk.lay_ahead(step + 1)
        assert (sizes(desk._indexes), desk._indexes._wanted) == ({}, {})
        desk.lay_out(step + 1)  # posted by the GPU
        assert sizes(desk._indexes) == {(0, 0): 2048, (0, 1): 2048}
        desk.lay_ahead(step + 2)
        assert sizes(desk._indexes) == {(layer, head): 2048 for layer in range(2) for head in range(2)}

        again = step + 4
        ring.views.header[3] = again
        desk.lay_out(again)
        desk.lay_ahead(again + 1)
        assert desk._ahead == (again, again + 1)  # nothing is missing
        desk.clear()
    finally:
        ring.close()


def test_what_a_step_waits_for_comes_first():
    ring = Ring(LAYOUT)
    try:
        message, _ = ring.fill(0, [4000, 3000], 3, [2048, 1024])
        indexes = ring.desks[0]._indexes
        one, other = sorted(message[:, 0])
        generations = {slot: int(ring.views.slots[slot, SLOT_GENERATION]) for slot in (one, other)}
        ring.views.slots[[one, other], SLOT_INDEXED] = 1024
        assert [slot for slot, *_ in indexes.live()] == [one, other]
        indexes.want(other, generations[other], 2048)
        assert indexes.live() == [(other, generations[other], 2048), (one, generations[one], 1024)]
        ring.views.slots[other, SLOT_INDEXED] = 2048
        assert indexes.live() == [(one, generations[one], 1024), (other, generations[other], 2048)]
    finally:
        ring.close()


def test_a_message_that_needs_much_has_all_threads_index_all_layers():
    """At the first step after a prompt, whose last part nobody has let them index yet."""
    ring = Ring(LAYOUT)
    message, _ = ring.fill(0, [4000], 3, [2048])
    slot = ring.views.slots[message[0, 0]]
    slot[SLOT_INDEXED] = 0
    desk = ring.desks[0]
    indexes = desk._indexes
    growers = [Grower(LAYOUT, ring.lane_views, indexes, thread, 2) for thread in range(2)]
    try:
        for grower in growers:
            grower.start()
        time.sleep(0.1)
        assert sizes(indexes) == {}
        ring.views.header[:] = 0, 1, -1, 0
        ring.views.rows[:1] = message
        desk.lay_out(0)
        await_true(lambda: sizes(indexes) == {(layer, head): 2048 for layer in range(3) for head in range(2)})

        ring.views.rows[0, ROW_INDEXED] = 2048 + 64  # a few tokens more: the leading thread's own work, layer by layer
        desk.lay_out(1)
        time.sleep(0.3)
        assert sizes(indexes) == {(layer, head): 2048 + 64 * (layer == 0) for layer in range(3) for head in range(2)}

        desk.clear()
        slot[SLOT_GENERATION] += 1  # another request's now, which has asked for nothing
        indexes.call()
        await_true(lambda: sizes(indexes) == {} and indexes._wanted == {})
    finally:
        for grower in growers:
            grower.stop()
        assert not any(grower.is_alive() for grower in growers)
        ring.close()
