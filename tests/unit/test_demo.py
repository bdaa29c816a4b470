# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: the result in its first line, and tables that fit a terminal of 80 columns."""

import io

import pytest
from rich.console import Console

from vllm_retrieval_attn import demo


def shown(*rights):
    row = {"key": "crimson-thistle", "position": 1980, "expected": "9892593", "answer": "the number is 9892593 of"}
    row |= {"seconds": 118.26, "prompt_tokens": 3979, "paged_tokens": 678, "host_tokens": 3328, "rows_read": 1232.5}
    out = io.StringIO()
    demo.show(Console(file=out, width=200), [row | {"right": right} for right in rights])
    return out.getvalue()


def test_the_first_line_is_the_result():
    assert shown(True, True).splitlines()[0] == "2 of 2 facts found, with 678 of 3,979 tokens in paged memory."
    assert shown(True, False).startswith("1 of 2 facts found")


@pytest.mark.parametrize("right", [True, False])
def test_the_table_fits_80_columns(right):
    lines = shown(right).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


def test_a_wrong_answer_is_shown_with_what_was_expected():
    assert "expected 9892593, was told: the number is" in shown(False)


def test_serve_tells_where_and_starts_what_the_demo_starts(monkeypatch, capsys):
    monkeypatch.delenv("RETRIEVAL_VIEW_KEY", raising=False)
    monkeypatch.setenv("RETRIEVAL_ADMIN_KEY", "mine")
    started = []
    monkeypatch.setattr(demo.os, "execve", lambda *how: started.append(how))
    monkeypatch.setattr(demo, "smollm2", lambda: "model")
    demo.serve(8123)
    (program, command, environment), said = started[0], capsys.readouterr().out
    assert program == command[0]
    assert command == demo.serve_command("model", 8123)
    assert environment["VLLM_PLUGINS"] == "retrieval"
    assert "http://127.0.0.1:8123/retrieval/" in said
    assert environment["RETRIEVAL_VIEW_KEY"] in said
    assert environment["RETRIEVAL_ADMIN_KEY"] == "mine"
