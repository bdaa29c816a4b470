"""Streaming-input sessions, as an asynchronous client feeds them; freed memory is poisoned throughout."""

import pytest

from tests.engines import EngineRun


def engine_runs(folder):
    out = folder / "sessions.json"
    return {"sessions": EngineRun(60, out, "tests.e2e.sessions", (str(out),))}


@pytest.fixture(scope="module")
def found(engine_run):
    return engine_run("sessions")


def test_a_session_answers_as_plain_requests_of_the_same_tokens_do(found):
    assert len(found["kept"]["got"]) == 5
    assert found["kept"]["got"] == found["kept"]["want"]


def test_a_session_holds_its_pages_between_chunks_and_none_when_it_is_over(found):
    assert found["kept"]["between"] == {"ledger": 10, "pages": 10, "stores": 1}
    assert found["kept"]["left"] == {"ledger": 0, "pages": 0, "stores": 0}
