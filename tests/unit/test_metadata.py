# SPDX-License-Identifier: Apache-2.0
"""The compact block table of a row: sink blocks, then window blocks."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_retrieval_attn.core.ownership import Split
from vllm_retrieval_attn.plugin.metadata import FixedTables, resident_columns


@st.composite
def batches(draw):
    resident, block = draw(st.integers(0, 800)), 16 * draw(st.integers(1, 4))
    split = Split(draw(st.integers(0, 100)), draw(st.integers(1, 150)), resident, block)
    rows = draw(st.lists(st.tuples(st.integers(0, 1200), st.integers(1, 80)), min_size=1, max_size=6))
    return split, rows, draw(st.integers(0, 5))


@given(batches())
def test_columns_are_the_sink_blocks_then_the_window_blocks(batch):
    split, rows, spare = batch
    sinks, block = split.sink_end, split.block_size
    windows = split.window_starts(np.array([computed for computed, _ in rows]))
    lengths = np.array([computed + new for computed, new in rows])
    width = int(-(-lengths.max() // block)) + spare
    resident = lengths - (windows - sinks)
    columns = resident_columns(windows, resident, sinks // block, block, width)
    assert columns.min() >= 0
    assert columns.max() < width
    for row, length in enumerate(lengths):
        paged = [p for p in range(length) if p < sinks or p >= windows[row]]
        assert len(paged) == resident[row]
        # Token i of the compact table is the i-th paged token.
        found = [int(columns[row, i // block]) * block + i % block for i in range(resident[row])]
        assert found == paged


def test_a_batch_of_padding_rows_has_one_valid_column():
    columns = resident_columns(np.array([32, 32]), np.array([0, 0]), 2, 16, 1)
    assert columns.tolist() == [[0], [0]]


def test_a_batch_of_no_rows_has_no_rows():
    empty = np.empty(0, np.int64)
    assert resident_columns(empty, empty, 1, 16, 4).shape == (0, 1)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([(16, 32, 0, 16), (0, 48, 100, 16), (40, 64, 256, 32)]))
def test_tables_that_stay_hold_what_others_would(seed, knobs):
    random = np.random.default_rng(seed)
    split = Split(*knobs)
    fixed = FixedTables(split, 6, torch.device("cpu"))
    for _ in range(2):  # what a batch leaves must not be seen by the next
        rows = int(random.integers(1, 7))
        computed = random.integers(0, 600, rows)
        table = torch.from_numpy(random.integers(1, 10**6, (rows, 64)).astype(np.int32))
        windows = split.window_starts(computed)
        lens = computed + 1 - (windows - split.sink_end)
        found, lens_found = fixed.fill(table, windows, lens)
        assert lens.max() <= fixed.longest == found.shape[1] * split.block_size
        assert lens_found.tolist() == lens.tolist()
        columns = resident_columns(windows, lens, split.sink_end // split.block_size, split.block_size, 64)
        wanted = table.gather(1, torch.from_numpy(columns))
        for row in range(rows):
            used = -(-int(lens[row]) // split.block_size)
            assert found[row, :used].tolist() == wanted[row, :used].tolist()
        assert found.data_ptr() == fixed.fill(table, windows, lens)[0].data_ptr()
