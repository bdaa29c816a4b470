# SPDX-License-Identifier: Apache-2.0
"""Which decode steps may be replayed as one graph."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm_retrieval_attn.core.options import SearchOptions
from vllm_retrieval_attn.core.ownership import Split
from vllm_retrieval_attn.core.prefixes import Match
from vllm_retrieval_attn.plugin.messages import Opening, StepMessage
from vllm_retrieval_attn.plugin.worker import RetrievalWorker
from vllm_retrieval_attn.store.code_pages import CodePages
from vllm_retrieval_attn.store.requests import RequestStore

PAGE = 1024
SPLIT = Split(sink_tokens=64, window_tokens=512, resident_tokens=4096, block_size=16)


def worker(codes: CodePages | None, *stores: RequestStore) -> RetrievalWorker:
    made = object.__new__(RetrievalWorker)
    made._default_options, made._options, made.sampler = SearchOptions(), {}, None
    made.sketch = SimpleNamespace() if codes is not None else None
    made.asking = None
    layout = SimpleNamespace(page_tokens_owned=lambda tokens: -(-tokens // PAGE))
    requests = {store.request_id: store for store in stores}
    made.arena = SimpleNamespace(
        requests=requests, layout=layout, codes=codes, filled=False,
        spare_codes=lambda: codes.pages - codes.used,
    )  # fmt: skip
    return made


def store(name: str, tokens: int, codes: list[int], sketched: bool = True) -> RequestStore:
    return RequestStore(name, 1, 0, 1, tokens=tokens, codes=codes, sketched=sketched)


def needs_pieces(made: RetrievalWorker, message: StepMessage | None, **scheduled: int) -> bool:
    made.needs_pieces = None
    made.config = SimpleNamespace(split=SPLIT)
    made.look_ahead(SimpleNamespace(kv_connector_metadata=message, num_scheduled_tokens=scheduled))
    return made.needs_pieces


def test_coded_requests_may_be_a_graph():
    codes = CodePages(8)
    held = []
    codes.grow(held, 2)
    made = worker(codes, store("a", 1500, held))
    assert needs_pieces(made, StepMessage(admitted={"a": 1}, resident={"b"}), a=1, b=1) is False
    assert needs_pieces(made, StepMessage(resident={"b"}), b=1) is False
    assert needs_pieces(made, None) is False


def test_a_request_without_codes_or_with_exact_attention_may_not():
    made = worker(CodePages(8), store("lost", 1500, [], sketched=False), store("a", 10, [0]))
    assert needs_pieces(made, StepMessage(admitted={"lost": 1}), lost=1)
    exact = {"a": SearchOptions(exact=True)}
    assert needs_pieces(made, StepMessage(admitted={"a": 1}, options=exact), a=1)
    made._options = exact
    assert needs_pieces(made, StepMessage(admitted={"a": 1}), a=1)
    made._options = {}
    assert not needs_pieces(made, StepMessage(admitted={"a": 1}), a=1)
    assert not needs_pieces(made, StepMessage(admitted={"lost": 2}), lost=1)  # admitted anew: it begins with codes


def test_a_request_about_to_lose_its_codes_may_not():
    codes = CodePages(3)
    held, others = [], []
    codes.grow(held, 2)
    made = worker(codes, store("a", 2 * PAGE, held))
    assert not needs_pieces(made, StepMessage(admitted={"a": 1}), a=1)  # its next page is the last one there is
    codes.grow(others, 1)
    made = worker(codes, store("a", 2 * PAGE, held), store("b", PAGE, others))
    assert needs_pieces(made, StepMessage(admitted={"a": 1, "b": 1}), a=1, b=1)
    made = worker(codes, store("a", 2 * PAGE - 1, held), store("b", PAGE - 1, others))
    assert not needs_pieces(made, StepMessage(admitted={"a": 1, "b": 1}), a=1, b=1)


def test_without_a_sketch_nothing_is_asked():
    made = worker(None, store("a", 10, []))
    assert needs_pieces(made, StepMessage(admitted={"a": 1}), a=1) is False


@pytest.mark.parametrize("drawn", [True, False])
def test_a_graph_may_ask_the_workers_but_where_a_step_is_to_be_compared(drawn):
    made = worker(None, store("a", 10, [], sketched=False))
    made.asking, made.sampler = SimpleNamespace(), SimpleNamespace(draw=lambda: drawn)
    exact = {"a": SearchOptions(exact=True)}
    assert needs_pieces(made, StepMessage(admitted={"a": 1}, options=exact), a=1) is drawn


@pytest.mark.parametrize("drawn", [True, False])
def test_a_step_that_is_to_be_compared_may_not(drawn):
    codes, held = CodePages(3), []
    codes.grow(held, 1)
    made = worker(codes, store("a", 10, held))
    made.sampler = SimpleNamespace(draw=lambda: drawn)
    assert needs_pieces(made, StepMessage(admitted={"a": 1}), a=1) is drawn
    assert needs_pieces(made, StepMessage(resident={"b"}), b=1) is False  # nothing to compare


def test_a_request_that_begins_with_what_is_kept_is_no_decode_step():
    made = worker(CodePages(16))
    opened = {"a": Opening(5000, match=Match(4096, (0, 1, 2)))}
    assert needs_pieces(made, StepMessage(admitted={"a": 1}, opened=opened), a=1) is True
    assert needs_pieces(made, StepMessage(admitted={"a": 1}, opened={"a": Opening(5000)}), a=1) is False


@pytest.mark.parametrize("computed", [0, 64, 65, 1000, 4096, 4097, 4112, 9000])
def test_a_row_attends_to_the_host_once_its_window_leaves_the_sinks(computed):
    made = worker(CodePages(16), store("a", max(0, computed - 64), list(range(8))))
    needs_pieces(made, StepMessage(admitted={"a": 1}, resident={"b"}), a=1, b=1)
    assert made.attends == (SPLIT.window_start(computed) > 64)
    needs_pieces(made, StepMessage(admitted={"a": 2}), a=1)  # admitted anew: nothing is written of it
    assert not made.attends
    made.arena.filled = True
    needs_pieces(made, StepMessage(admitted={"a": 2}), a=1)
    assert made.attends
