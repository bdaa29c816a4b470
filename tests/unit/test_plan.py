# SPDX-License-Identifier: Apache-2.0
"""A step's host work: what a batch row writes to its store."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_retrieval_attn.core.options import SearchOptions
from vllm_retrieval_attn.core.ownership import Split
from vllm_retrieval_attn.device.decode_step import StepRow
from vllm_retrieval_attn.device.plan import make_plan
from vllm_retrieval_attn.store.code_pages import CodePages
from vllm_retrieval_attn.store.requests import RequestStore

SINK, PAGE = 16, 64
DEFAULT = SearchOptions()


class Arena:
    """One store an admission, its pages numbered by position; pages of codes from the last one on."""

    def __init__(self, codes=None, indexed=False):
        self.stores = {}
        self.codes = codes
        self.filled = False
        self.layout = SimpleNamespace(indexed=indexed, page_tokens=PAGE)

    def open(self, request_id, epoch):
        fresh = RequestStore(request_id, epoch, 0, 1, sketched=self.codes is not None)
        return self.stores.setdefault((request_id, epoch), fresh)

    def grow(self, store, tokens):
        store.pages = list(range(-(-tokens // PAGE)))
        if store.sketched:
            store.sketched = self.codes.grow(store.codes, len(store.pages))

    def token_positions(self, store, first, last):
        tokens = np.arange(first, last)
        return tokens // PAGE, tokens % PAGE


def plan(arena, epoch, computed, length, options=DEFAULT, graph=False):
    return batch(arena, [("r", computed, length)], {"r": epoch}, options, graph)


def batch(arena, rows, epochs, options=DEFAULT, graph=False):
    split = Split(SINK, 32, 0, 16)
    computed, lengths = (np.array([row[n] for row in rows]) for n in (1, 2))
    metadata = SimpleNamespace(
        request_ids=[row[0] for row in rows],
        query_start=np.concatenate(([0], np.cumsum(lengths))),
        query_lens=lengths,
        computed=computed,
        windows=split.window_starts(computed),
    )
    return make_plan(metadata, arena, epochs, split, lambda request_id: options, graph)


def test_tokens_computed_again_are_written_over():
    arena = Arena()
    plan(arena, 1, 0, 100)
    again = plan(arena, 1, 99, 30)  # a session whose last token was in flight when its chunk ended
    assert (again.mirror_offsets + again.mirror_pages * PAGE).tolist() == list(range(99 - SINK, 129 - SINK))
    assert arena.open("r", 1).tokens == 129 - SINK


@pytest.mark.parametrize("epoch", [1, 2])
def test_tokens_that_an_admission_never_had_stop_the_step(epoch):
    arena = Arena()
    plan(arena, 1, 0, 50)
    with pytest.raises(RuntimeError, match="never written"):
        plan(arena, epoch, 60, 1)


def test_tokens_of_a_prompt_are_coded_where_they_are_mirrored():
    arena = Arena(CodePages(3))
    first = plan(arena, 1, 0, 150)
    sketch = first.sketch
    assert (sketch.encode_tokens == first.mirror_tokens).all()
    assert (sketch.encode_offsets == first.mirror_offsets).all()
    assert np.unique(sketch.encode_pages).tolist() == sorted(arena.open("r", 1).codes)
    assert not sketch.attends
    assert not first.prefill
    second = plan(arena, 1, 150, 30)
    assert [row.host_tokens for row in second.prefill] == [112 - SINK]


def test_a_graph_has_a_row_for_every_row_of_its_batch():
    arena = Arena(CodePages(8))
    epochs = {"long": 1, "young": 2}
    for name, length in (("long", 300), ("young", 20)):
        batch(arena, [(name, 0, length)], epochs)
    rows = [("other", 90, 1), ("long", 300, 1), ("young", 20, 1)]
    found = batch(arena, rows, epochs, SearchOptions(rows=100, tau=0.01, seed=5), graph=True)
    sketch = found.sketch
    assert sketch.ids == [None, "long", "young"]
    assert sketch.tokens == [0, 1, 2]
    long, young = arena.open("long", 1), arena.open("young", 2)
    pages = tuple(long.pages), tuple(long.codes)
    assert (sketch.rows[0].tokens, sketch.rows[0].write) == (0, -1)
    assert sketch.rows[1] == StepRow(256 - SINK, 300 - SINK, 300, 100, 0.01, 5, 0, *pages)
    assert (sketch.rows[2].tokens, sketch.rows[2].write, sketch.rows[2].sketch_pages) == (
        0,
        20 - SINK,
        (young.codes[0],),
    )
    assert len(found.mirror_tokens) == 0  # the graph's own kernels write to the host
    assert (long.tokens, young.tokens) == (301 - SINK, 21 - SINK)


def test_without_a_graph_only_rows_that_attend_to_the_host_are_in_the_sketch():
    arena = Arena(CodePages(8))
    epochs = {"long": 1, "young": 2}
    for name, length in (("long", 300), ("young", 20)):
        batch(arena, [(name, 0, length)], epochs)
    found = batch(arena, [("young", 20, 1), ("long", 300, 1)], epochs)
    assert found.sketch.ids == ["long"]
    assert found.sketch.tokens == [1]
    assert (found.sketch.rows[0].tokens, found.sketch.rows[0].write) == (256 - SINK, -1)
    assert found.mirror_tokens.tolist() == found.sketch.encode_tokens.tolist() == [0, 1]
    assert not found.searched


@pytest.mark.parametrize("why", ["exact", "no room"])
def test_what_the_sketch_can_not_answer_goes_to_the_workers(why):
    arena = Arena(CodePages(1 if why == "no room" else 8), indexed=True)
    options = SearchOptions(exact=why == "exact")
    plan(arena, 1, 0, 2000, options)
    found = plan(arena, 1, 2000, 1, options)
    assert found.decode_ids == ["r"]
    assert found.sketch.ids == []
    assert (found.decode_rows[0][3] > 0) == (why == "no room")
    if why == "no room":
        assert arena.codes.used == 0  # all or none
        with pytest.raises(RuntimeError, match="no codes"):
            plan(arena, 1, 2001, 1, options, graph=True)


def test_tokens_of_a_filled_arena_count_as_written():
    arena = Arena(CodePages(8))
    arena.filled = True
    found = plan(arena, 1, 400, 1, graph=True)
    store = arena.open("r", 1)
    assert store.tokens == 401 - SINK
    assert len(store.pages) == len(store.codes) == 7
    assert (found.sketch.rows[0].tokens, found.sketch.rows[0].write) == (368 - SINK, 400 - SINK)
