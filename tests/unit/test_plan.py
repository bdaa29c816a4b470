"""A step's host work: what a batch row writes to its store."""

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_retrieval_attn.core.ownership import Split
from vllm_retrieval_attn.device.plan import make_plan
from vllm_retrieval_attn.store.requests import RequestStore

SINK, PAGE = 16, 64


class Arena:
    """One store an admission, its pages numbered by position."""

    def __init__(self):
        self.stores = {}
        self.layout = SimpleNamespace(indexed=False)

    def open(self, request_id, epoch):
        return self.stores.setdefault((request_id, epoch), RequestStore(request_id, epoch, 0, 1))

    def grow(self, store, tokens):
        pass

    def token_positions(self, store, first, last):
        tokens = np.arange(first, last)
        return tokens // PAGE, tokens % PAGE


def plan(arena, epoch, computed, length):
    row = np.array([length])
    metadata = SimpleNamespace(
        request_ids=["r"],
        query_start=np.array([0, length]),
        query_lens=row,
        computed=np.array([computed]),
        windows=np.array([SINK]),
    )
    return make_plan(metadata, arena, {"r": epoch}, Split(SINK, 32, 0, 16))


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
