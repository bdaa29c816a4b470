# SPDX-License-Identifier: Apache-2.0
"""Who has which page of codes."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_retrieval_attn.store.code_pages import CodePages


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=60))
def test_pages_have_one_owner_and_come_back(capacity, asked):
    pages = CodePages(capacity)
    held = [[], [], [], []]
    for owner, need in asked:
        before = list(held[owner])
        if need < len(before):
            pages.release(held[owner])
            assert held[owner] == []
        elif pages.grow(held[owner], need):
            assert len(held[owner]) == need
            assert held[owner][: len(before)] == before
        else:
            assert held[owner] == before
            assert sum(map(len, held)) + need - len(before) > capacity
        flat = [page for one in held for page in one]
        assert len(set(flat)) == len(flat) == pages.used
        assert all(0 <= page < capacity for page in flat)
