"""The compact block table of a row: sink blocks, then window blocks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_retrieval_attn.core.ownership import Split
from vllm_retrieval_attn.plugin.metadata import resident_columns


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
