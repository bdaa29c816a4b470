# SPDX-License-Identifier: Apache-2.0
"""When indexes may grow over what a step wrote."""

from types import SimpleNamespace

import pytest

from vllm_retrieval_attn.plugin.worker import RetrievalWorker


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
