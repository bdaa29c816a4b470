# SPDX-License-Identifier: Apache-2.0
"""Streaming-input sessions, as an asynchronous client feeds them; freed memory is poisoned throughout."""

import pytest

from tests.engines import EngineRun


def engine_runs(folder):
    out = folder / "sessions.json"
    return {"sessions": EngineRun(80, out, "tests.e2e.sessions", (str(out),))}


@pytest.fixture(scope="module")
def found(engine_run):
    return engine_run("sessions")


def test_a_session_answers_as_plain_requests_of_the_same_tokens_do(found):
    assert len(found["kept"]["got"]) == 5
    assert found["kept"]["got"] == found["kept"]["want"]


def test_a_session_holds_its_pages_between_chunks(found):
    assert found["kept"]["between"] == {"ledger": 10, "pages": 10, "stores": 1}


def test_a_session_that_outgrows_host_memory_fails_alone_and_at_once(found):
    outgrown = found["outgrown"]
    assert outgrown["finish"] == ["length", "length", "length", "error"]
    assert outgrown["over"]
    assert outgrown["seconds_to_fail"] < 10
    assert outgrown["short"] == outgrown["afterwards"]
    assert len(outgrown["short"]) == outgrown["serves_long"] == 12


def test_of_two_sessions_that_want_each_others_memory_one_waits_and_both_answer_right(found):
    crossed = found["crossed"]
    assert crossed["waited"]
    assert crossed["passing"] == 12
    assert crossed["got"] == crossed["want"]


def test_samples_that_do_not_fit_at_once_come_one_after_the_other(found):
    assert found["samples"]["got"] == found["samples"]["want"]


@pytest.mark.parametrize("part", ["kept", "outgrown", "crossed", "samples"])
def test_nothing_is_left(found, part):
    assert found[part]["left"] == {"ledger": 0, "pages": 0, "stores": 0}
