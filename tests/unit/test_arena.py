# SPDX-License-Identifier: Apache-2.0
"""The arena: nobody writes a page that others have, freed pages are poisoned, everything is free at the end."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.layouts import DTYPES, make_layout
from vllm_retrieval_attn.store.arena import Arena, ArenaFull
from vllm_retrieval_attn.store.code_pages import CodePages
from vllm_retrieval_attn.store.layout import SLOT_GENERATION, SLOT_INDEXED, SLOT_SPACE, WORD_GROWTH
from vllm_retrieval_attn.workers.desk import Desk
from vllm_retrieval_attn.workers.indexes import Indexes

IDS = st.sampled_from(["a", "b", "c", "d", "e"])


def make_arena(dtype="float32", poison=True, **shape):
    return Arena(make_layout(dtype, **shape), DTYPES[dtype], rank=91, poison=poison)


class ArenaLife(RuleBasedStateMachine):
    """Random admissions, growth and releases against a model of who holds what."""

    @initialize(dtype=st.sampled_from(list(DTYPES)), rows=st.integers(1, 4))
    def make(self, dtype, rows):
        self.arena = make_arena(dtype, max_rows=rows, table_pages=6, dim=8, layers=1)
        self.arena.pages[:] = float("nan")
        self.model: dict[str, tuple[int, int]] = {}  # id -> (epoch, tokens)
        self.indexed: dict[int, int] = {}  # epoch -> tokens
        self.kept: dict[int, tuple[int, int]] = {}  # number -> (page, epoch of its writer)
        self.writers: dict[int, list[int]] = {}  # epoch -> epoch that wrote each page
        self.numbers = 0
        self.generations: set[int] = set()
        self.epoch = 0
        # Half the pages: growth can meet a full arena.
        self.spare = [self.arena._free.pop() for _ in range(self.arena.layout.pages // 2)]

    def teardown(self):
        if not hasattr(self, "arena"):
            return
        for request_id in list(self.arena.requests):
            self.arena.release(request_id, self.epoch)
        assert self.arena.used_pages == 0
        for number in list(self.arena.kept):
            self.arena.drop(number)
        assert not self.arena._users
        assert sorted(self.arena._free + self.spare) == list(range(self.arena.layout.pages))
        assert sorted(self.arena._slots) == list(range(self.arena.layout.max_rows))
        assert self.arena.host_tokens == 0
        assert self.arena.pages.isnan().all()
        self.arena.close()

    @rule(request_id=IDS)
    def admit(self, request_id):
        """A new admission; one of an older epoch loses what it held."""
        self.epoch += 1
        full = request_id not in self.model and len(self.model) == self.arena.layout.max_rows
        if full:
            with pytest.raises(ArenaFull):
                self.arena.open(request_id, self.epoch)
            return
        store = self.arena.open(request_id, self.epoch)
        assert (store.epoch, store.pages, store.tokens) == (self.epoch, [], 0)
        assert store.generation not in self.generations
        assert self.arena.views.slots[store.slot, SLOT_SPACE] == self.arena.space
        self.generations.add(store.generation)
        self.model[request_id] = (self.epoch, 0)
        self.indexed[self.epoch] = 0
        self.writers[self.epoch] = []

    @rule(request_id=IDS, share=st.integers(0, 3))
    def adopt(self, request_id, share):
        """An admission begins with pages that are kept."""
        if self.model.get(request_id, (0, 1))[1] or self.arena.requests[request_id].pages:
            return
        epoch, page_tokens = self.model[request_id][0], self.arena.layout.page_tokens
        whole = [number for number, (_, writer) in self.kept.items() if writer >= 0][:share]
        store = self.arena.requests[request_id]
        assert self.arena.adopt(store, whole) == []
        store.written(len(whole) * page_tokens)
        self.writers[epoch] = [self.kept[number][1] for number in whole]
        self.model[request_id] = epoch, len(whole) * page_tokens

    @rule(request_id=IDS, index=st.integers(0, 5))
    def keep(self, request_id, index):
        """A full page is kept."""
        if request_id not in self.model:
            return
        epoch, tokens = self.model[request_id]
        store = self.arena.requests[request_id]
        taken = [page for page, _ in self.kept.values()]
        if tokens < (index + 1) * self.arena.layout.page_tokens or store.pages[index] in taken:
            return
        self.arena.keep(store, index, self.numbers)
        self.kept[self.numbers] = store.pages[index], self.writers[epoch][index]
        self.numbers += 1

    @rule(number=st.integers(0, 20))
    def drop(self, number):
        if number in self.kept:
            self.arena.drop(number)
            del self.kept[number]

    @rule(space=st.integers(0, 1))
    def learn(self, space):
        self.arena.space = space

    @rule(request_id=IDS, share=st.floats(0, 1))
    def allow_indexing(self, request_id, share):
        """More tokens are allowed and told to the actors; fewer change nothing."""
        if request_id not in self.model:
            return
        epoch, tokens = self.model[request_id]
        allowed = int(share * tokens)
        growth = int(self.arena.views.words[WORD_GROWTH])
        self.arena.allow_indexing(self.arena.requests[request_id], allowed)
        assert self.arena.views.words[WORD_GROWTH] == growth + (allowed > self.indexed[epoch])
        self.indexed[epoch] = max(allowed, self.indexed[epoch])

    @rule(request_id=IDS)
    def open_again(self, request_id):
        """The same epoch finds the same store."""
        if request_id in self.model:
            store = self.arena.requests[request_id]
            assert self.arena.open(request_id, self.model[request_id][0]) is store

    @rule(request_id=IDS, more=st.integers(1, 150))
    def grow(self, request_id, more):
        if request_id not in self.model:
            return
        epoch, tokens = self.model[request_id]
        store = self.arena.open(request_id, epoch)
        target = min(tokens + more, self.arena.layout.page_tokens * self.arena.layout.table_pages)
        need = self.arena.layout.page_tokens_owned(target) - len(store.pages)
        if need > len(self.arena._free):
            with pytest.raises(ArenaFull):
                self.arena.grow(store, target)
            return
        self.arena.grow(store, target)
        self.writers[epoch] += [epoch] * (len(store.pages) - len(self.writers[epoch]))
        pages, offsets = self.arena.token_positions(store, tokens, target)
        self.arena.pages[torch.from_numpy(pages), :, :, torch.from_numpy(offsets)] = float(epoch)
        store.written(target)
        self.model[request_id] = (epoch, target)

    @rule(request_id=IDS, age=st.integers(-2, 1))
    def release(self, request_id, age):
        """A release of an older epoch is too late and changes nothing."""
        if request_id not in self.model:
            self.arena.release(request_id, self.epoch)
            return
        epoch, _ = self.model[request_id]
        growth = int(self.arena.views.words[WORD_GROWTH])
        self.arena.release(request_id, epoch + age)
        assert self.arena.views.words[WORD_GROWTH] == growth + (age >= 0)
        if age >= 0:
            del self.model[request_id]

    @invariant()
    def pages_have_one_owner_and_hold_what_it_wrote(self):
        if not hasattr(self, "arena"):
            return
        arena = self.arena
        assert set(arena.requests) == set(self.model)
        owned = [page for store in arena.requests.values() for page in store.pages]
        kept = [page for page, _ in self.kept.values()]
        everything = [*set(owned + kept), *arena._free, *self.spare]
        assert sorted(everything) == list(range(arena.layout.pages))
        assert arena.used_bytes == len(set(owned)) * arena.layout.page_bytes
        for page, writer in self.kept.values():
            assert (arena.pages[page] == writer).all()
        slots = [store.slot for store in arena.requests.values()]
        assert sorted(slots + arena._slots) == list(range(arena.layout.max_rows))
        assert arena.host_tokens == sum(tokens for _, tokens in self.model.values())
        assert arena.indexed_tokens == sum(self.indexed[epoch] for epoch, _ in self.model.values())
        generations = [store.generation for store in arena.requests.values()]
        assert len(set(generations)) == len(generations)
        assert 0 not in generations
        assert not arena.views.slots[arena._slots, SLOT_GENERATION].any()
        assert arena.pages[arena._free].isnan().all()
        for request_id, (epoch, tokens) in self.model.items():
            store = arena.requests[request_id]
            assert arena.views.tables[store.slot, : len(store.pages)].tolist() == store.pages
            assert arena.views.slots[store.slot, SLOT_GENERATION] == store.generation
            assert arena.views.slots[store.slot, SLOT_INDEXED] == self.indexed[epoch]
            pages, offsets = arena.token_positions(store, 0, tokens)
            found = arena.pages[torch.from_numpy(pages), 0, 0, torch.from_numpy(offsets), 0, 0]
            wrote = torch.tensor(self.writers[epoch], dtype=torch.float64)
            assert (found == wrote.to(found.dtype).repeat_interleave(arena.layout.page_tokens)[:tokens]).all()


TestArenaLife = ArenaLife.TestCase
TestArenaLife.settings = settings(max_examples=40, stateful_step_count=25)


@pytest.fixture
def arena():
    made = make_arena()
    yield made
    made.close()


def test_what_a_full_arena_gave_before_it_refused_comes_back(arena):
    stores = [arena.open(name, 1) for name in "abcdef"]
    for store in stores:
        arena.grow(store, 6 * 64)
    with pytest.raises(ArenaFull, match="more than 6 requests"):
        arena.open("g", 1)
    for name in "abcdef":
        arena.release(name, 1)
    assert arena.used_pages == 0


def test_growing_to_fewer_tokens_takes_nothing(arena):
    store = arena.open("a", 1)
    arena.grow(store, 100)
    arena.grow(store, 3)
    assert len(store.pages) == 2


def test_token_positions_are_pages_and_offsets_in_token_order(arena):
    arena.grow(arena.open("other", 1), 64)
    store = arena.open("a", 1)
    arena.grow(store, 130)
    pages, offsets = arena.token_positions(store, 62, 130)
    assert pages.tolist() == [store.pages[t // 64] for t in range(62, 130)]
    assert offsets.tolist() == [t % 64 for t in range(62, 130)]


def test_a_page_table_has_another_generation_for_each_owner_and_none_between(arena):
    store = arena.open("a", 1)
    arena.grow(store, 100)
    arena.allow_indexing(store, 64)
    arena.release("a", 1)
    assert arena.views.slots[store.slot, SLOT_GENERATION] == 0
    arena.space = 1
    later = arena.open("a", 2)
    assert later.slot == store.slot
    assert later.generation > store.generation
    assert arena.views.slots[later.slot].tolist() == [later.generation, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_released_page_reads_as_nan(dtype):
    arena = make_arena(dtype)
    store = arena.open("a", 1)
    arena.grow(store, 64)
    arena.pages[store.pages] = 1.0
    arena.release("a", 1)
    assert arena.pages[store.pages].isnan().all()
    assert (arena.views.tables[store.slot] < 0).all()
    arena.close()


def test_a_thousand_requests_that_may_come_take_no_memory_before_they_do():
    layout = replace(
        make_layout("bfloat16", kv_heads=8, group=4, dim=128, page_tokens=1024, indexed=True), layers=32, max_rows=1024,
        table_pages=1025, pages=8, threads=15, actors=1,
    )  # fmt: skip
    arena = Arena(layout, torch.bfloat16, rank=91)
    desk = Desk(layout, arena.views, Indexes(layout, arena.views, 0), 1.0, 4096)
    taken = os.stat(arena.file.path).st_blocks * 512
    assert taken < 1 << 20 < layout.file_bytes
    store = arena.open("a", 1)
    arena.grow(store, 10)
    assert os.stat(arena.file.path).st_blocks * 512 < taken + (1 << 20)
    del desk
    arena.close()


def test_codes_go_with_pages_until_there_is_no_room(arena):
    arena.codes = CodePages(3)
    first, second = arena.open("a", 1), arena.open("b", 1)
    arena.grow(first, 2 * 64)
    assert first.sketched
    assert len(first.codes) == len(first.pages) == 2
    arena.grow(second, 2 * 64)  # one page of codes is left
    assert (second.sketched, second.codes, len(second.pages)) == (False, [], 2)
    assert (arena.uncoded, arena.codes.used) == (1, 2)
    arena.grow(second, 3 * 64)
    assert arena.uncoded == 1
    arena.release("a", 1)
    assert arena.codes.used == 0
    arena.release("b", 1)
    again = arena.open("b", 2)
    arena.grow(again, 64)
    assert again.sketched


def test_a_kept_page_shares_its_codes_and_may_lose_them(arena):
    """Codes of pages that nobody uses make room; the next one who begins with such a page has to make them again."""
    arena.codes = CodePages(4)
    first = arena.open("a", 1)
    arena.grow(first, 2 * 64)
    codes = list(first.codes)
    for index in (0, 1):
        arena.keep(first, index, index)
    second = arena.open("b", 1)
    assert arena.adopt(second, [0, 1]) == []
    assert (second.pages, second.codes, second.space) == (first.pages, codes, first.space)
    arena.release("a", 1)
    arena.grow(second, 3 * 64)
    assert arena.spare_codes() == 1
    arena.release("b", 1)
    assert arena.codes.used == 2
    assert arena.spare_codes() == 4
    other = arena.open("c", 1)
    arena.grow(other, 3 * 64)
    assert other.sketched
    assert [kept.code is None for kept in arena.kept.values()] == [True, False]
    arena.release("c", 1)
    third = arena.open("d", 1)
    assert arena.adopt(third, [0, 1]) == [0]
    assert third.sketched
    assert arena.kept[0].code == third.codes[0]
    assert third.codes[1] == codes[1]
    arena.release("d", 1)
    for number in (0, 1):
        arena.drop(number)
    assert arena.codes.used == 0


def test_all_codes_of_a_request_are_of_one_space(arena):
    arena.codes = CodePages(8)
    first = arena.open("a", 1)
    arena.grow(first, 64)
    arena.keep(first, 0, 0)
    arena.space, arena.space_tokens = 1, 10**6
    second = arena.open("b", 1)
    assert second.space == 1
    arena.grow(second, 2 * 64)
    arena.keep(second, 1, 1)
    third = arena.open("c", 1)
    assert arena.adopt(third, [0, 1]) == [1]  # it gets codes of its own for the second page
    assert third.space == 0
    assert arena.views.slots[third.slot, SLOT_SPACE] == 0
    assert third.codes[0] == first.codes[0]
    assert third.codes[1] not in second.codes
    assert arena.kept[1].code == second.codes[1]


def test_without_room_for_codes_a_request_goes_without(arena):
    arena.codes = CodePages(2)
    first = arena.open("a", 1)
    arena.grow(first, 64)
    arena.keep(first, 0, 0)
    arena.kept[0].code = None
    arena.codes.release([first.codes[0]])
    other = arena.open("b", 1)
    arena.grow(other, 64)
    second = arena.open("c", 1)
    assert arena.adopt(second, [0]) == []
    assert not second.sketched
    assert second.pages == first.pages


def test_requests_that_share_pages_have_no_more_together_than_the_kernels_can_take(arena):
    arena.codes = CodePages(4, together=5)
    first = arena.open("a", 1)
    arena.grow(first, 2 * 64)
    for index in (0, 1):
        arena.keep(first, index, index)
    second, third = arena.open("b", 1), arena.open("c", 1)
    arena.adopt(second, [0, 1])
    assert (second.sketched, arena.spare_codes()) == (True, 1)
    arena.adopt(third, [0, 1])
    assert (third.sketched, third.codes, arena.spare_codes()) == (False, [], 1)
    arena.grow(second, 3 * 64)
    assert (second.sketched, arena.spare_codes()) == (True, 0)
    arena.grow(second, 4 * 64)
    assert (second.sketched, arena.spare_codes()) == (False, 2)
    for name in "abc":
        arena.release(name, 1)
    assert arena.spare_codes() == 4
    assert arena.used_codes() == 0
