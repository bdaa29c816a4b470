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


def test_a_message_that_needs_much_has_all_threads_index_all_layers():
    """At the first step after a prompt, whose last part nobody has let them index yet."""
    layout = make_layout(
        kv_heads=2, group=2, dim=64, layers=3, page_tokens=256, table_pages=40, max_rows=3, indexed=True, threads=2
    )
    ring = Ring(layout)
    message, _ = ring.fill(0, [4000], 3, [2048])
    slot = ring.views.slots[message[0, 0]]
    slot[SLOT_INDEXED] = 0
    desk = ring.desks[0]
    indexes = desk._indexes
    growers = [Grower(layout, ring.lane_views, indexes, thread, 2) for thread in range(2)]
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
