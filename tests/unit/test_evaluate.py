# SPDX-License-Identifier: Apache-2.0
"""KL and perplexity by hand, and the rows and table that a fake engine gives."""

import io
import json
import math
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from vllm_retrieval_attn import cli_eval
from vllm_retrieval_attn.evaluation import evaluate as runs
from vllm_retrieval_attn.evaluation import runners
from vllm_retrieval_attn.evaluation.evaluate import Settings, divergence, evaluate, perplexity, table
from vllm_retrieval_attn.evaluation.runners import Scores
from vllm_retrieval_attn.evaluation.tasks import Task


def scores(rows, true=None, whole=True):
    """Scores from one {token: probability} a position."""
    ids = np.array([list(row) for row in rows])
    logprobs = np.log(np.array([list(row.values()) for row in rows]))
    return Scores(ids, logprobs, logprobs[:, 0] if true is None else np.log(np.array(true)), whole)


def test_kl_over_the_whole_vocabulary():
    p, q = {0: 0.5, 1: 0.25, 2: 0.25}, {2: 0.5, 0: 0.25, 1: 0.25}
    want = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert divergence(scores([p, p]), scores([q, p])) == pytest.approx([want, 0])


def test_kl_takes_unknown_tokens_as_one():
    p, q = {0: 0.5, 1: 0.3}, {0: 0.25, 2: 0.7}
    want = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(scores([p], whole=False), scores([q], whole=False)) == pytest.approx([want])


def test_kl_of_equal_distributions_is_0_and_never_less():
    p = dict.fromkeys(range(1000), 1 / 1000)
    assert divergence(scores([p]), scores([p])) == [0.0]
    rounded = dict.fromkeys(range(1000), 1 / 1000 + 1e-10)  # sums to a little more than 1
    assert divergence(scores([p]), scores([rounded])) == [0.0]
    assert divergence(scores([{0: 1.0}], whole=False), scores([{0: 1.0}], whole=False)) == [0.0]


def test_perplexity_is_over_all_tokens():
    parts = [scores([{0: 1.0}], true=[0.5]), scores([{0: 1.0}] * 2, true=[0.25, 0.25])]
    assert perplexity(parts) == pytest.approx(0.5 ** (-5 / 3))


def test_a_forced_request_can_sample_its_token_only():
    force = runners.ForceTokens(None, torch.device("cpu"), False)
    output: list[int] = []
    params = SimpleNamespace(extra_args={runners._FORCED: [3, 1]})
    free = SimpleNamespace(extra_args=None)
    force.update_state(SimpleNamespace(added=[(0, free, [], []), (1, params, [], output)], removed=[], moved=[]))
    for want in (3, 1):
        logits = force.apply(torch.ones(2, 5))
        assert logits[0].tolist() == [1.0] * 5
        assert logits[1].argmax() == want
        assert logits[1].isfinite().sum() == 1
        output.append(want)
    assert force.apply(torch.ones(2, 5)).isfinite().all()  # the list is through
    assert not force.is_argmax_invariant()


class FakeRunner:
    """Knows the answer if ``sees``; its distributions are as sure of the text."""

    limit = 4000
    open_now = 0

    def __init__(self, sees: bool) -> None:
        self.sees, self.tokens_asked, self.rows_read = sees, [], []
        FakeRunner.open_now += 1
        assert FakeRunner.open_now == 1  # the one before is closed

    def encode(self, text, special=False):
        return [1] * special + list(text.encode())

    def answer(self, task):
        assert task.prompt[0] == 1
        self.tokens_asked.append(len(task.prompt))
        self.rows_read.append(len(self.tokens_asked) * 100)
        return " ".join(task.expected) if self.sees else "no"

    def score(self, passage):
        sure = 0.8 if self.sees else 0.4
        return scores([{token: sure, 300: 1 - sure} for token in passage.tokens[1:]])

    def close(self):
        FakeRunner.open_now -= 1


class FakeServer(FakeRunner):
    def score(self, passage):
        return None


SETTINGS = Settings(text="Some words of a text. " * 300, tasks=("planted", "prose"), lengths=(1000, 2000), count=2)


def run(*modes):
    return list(evaluate([(name, lambda make=make, sees=sees: make(sees)) for name, make, sees in modes], SETTINGS))


def test_rows_of_engines():
    rows = run(("full", FakeRunner, True), ("flat", FakeRunner, True), ("none", FakeRunner, False))
    assert json.loads(json.dumps(rows)) == rows
    assert [list(row) for row in rows] == [
        ["mode", "task", "length", "n", "right", "same_as_full", "kl", "ppl", "rows_mean"]
    ] * 12
    by_name = {(row["mode"], row["task"], row["length"]): row for row in rows}
    assert len(by_name) == 12
    full, flat, none = (by_name[mode, "planted", 1000] for mode in ("full", "flat", "none"))
    assert (full["n"], full["right"], full["same_as_full"], full["kl"], full["ppl"]) == (2, 1.0, None, None, None)
    assert (flat["right"], flat["same_as_full"]) == (1.0, 1.0)
    assert (none["right"], none["same_as_full"]) == (0.0, 0.0)
    assert (none["rows_mean"], by_name["none", "planted", 2000]["rows_mean"]) == (150.0, 350.0)
    assert by_name["none", "prose", 2000]["rows_mean"] is None
    full, flat, none = (by_name[mode, "prose", 2000] for mode in ("full", "flat", "none"))
    assert (full["n"], full["right"], full["same_as_full"], full["kl"]) == (96, None, None, None)
    assert full["ppl"] == pytest.approx(1 / 0.8)
    assert (flat["kl"], flat["ppl"]) == (0.0, full["ppl"])
    assert none["ppl"] == pytest.approx(1 / 0.4)
    assert none["kl"] == pytest.approx(0.8 * math.log(2) + 0.2 * math.log(1 / 3))


def test_rows_of_servers():
    rows = run(("full", FakeServer, True), ("server", FakeServer, False))
    by_name = {(row["mode"], row["task"], row["length"]): row for row in rows}
    assert by_name["server", "planted", 2000]["same_as_full"] == 0.0
    prose = by_name["server", "prose", 2000]
    assert (prose["n"], prose["right"], prose["same_as_full"], prose["kl"], prose["ppl"]) == (0, None, None, None, None)
    alone = run(("server", FakeServer, True))
    assert alone[0]["right"] == 1.0
    assert alone[0]["same_as_full"] is None


def test_progress_ends_where_it_said():
    seen = []
    starts = [("full", lambda: FakeRunner(True)), ("none", lambda: FakeRunner(False))]
    list(evaluate(starts, SETTINGS, lambda what, done: seen.append(done)))
    assert sum(seen) == runs.steps(starts, SETTINGS)


def test_a_task_may_have_a_count_of_its_own():
    from vllm_retrieval_attn.cli_eval import _counts

    names, counts = _counts("prose:3, planted")
    assert (names, counts) == ("prose,planted", {"prose": 3})
    settings = replace(SETTINGS, counts=counts, lengths=(1000,))
    starts = [("full", lambda: FakeRunner(True))]
    found = {row["task"]: row["n"] for row in evaluate(starts, settings)}
    assert found == {"planted": 2, "prose": 3 * 48}
    assert runs.steps(starts, settings) == 5
    with pytest.raises(typer.BadParameter, match="crowd:none"):
        _counts("crowd:none")


def test_longer_than_the_model_is_refused_and_the_engine_closed():
    settings = Settings(text="text", lengths=(1000, 4001))
    with pytest.raises(ValueError, match=r"^retrieval: full takes 4000 tokens at most"):
        list(evaluate([("full", lambda: FakeRunner(True))], settings))
    assert FakeRunner.open_now == 0


def test_full_attention_comes_first_and_once():
    starts = runners.engines("model", ["flat", "full", "none", "flat"], [10, 20], {})
    assert [name for name, _ in starts] == ["full", "flat", "none"]
    assert [name for name, _ in runners.servers("http://a", "m", "server", None)] == ["server"]
    assert [name for name, _ in runners.servers("http://a", "m", "server", "http://b")] == ["full", "server"]


def test_the_table_sets_modes_side_by_side():
    rows = run(("full", FakeRunner, True), ("none", FakeRunner, False))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(rows))
    lines = console.export_text().splitlines()
    (planted,) = [line for line in lines if "planted" in line and "1,000" in line]
    assert "1.00" in planted
    assert "0.00 (0.00)" in planted
    (prose,) = [line for line in lines if "prose" in line and "2,000" in line]
    assert "1.25" in prose
    assert "2.50 (0.33)" in prose


class FakeVllm(BaseHTTPRequestHandler):
    """Tokens are bytes, after one that begins a text; says what it was asked."""

    def log_message(self, *args):
        pass

    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply({"object": "list", "data": [{"id": "first", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            ids = [1] * asked["add_special_tokens"] + list(asked["prompt"].encode())
            self.reply({"count": len(ids), "max_model_len": 5000, "tokens": ids})
            return
        assert self.path == "/v1/completions"
        text = f"{asked['model']} {len(asked['prompt'])} {asked['max_tokens']} {asked['temperature']}"
        choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": None}
        self.reply({"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})


@pytest.fixture
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeVllm) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_server_is_asked_through_its_api(url):
    runner = runners.ServerRunner(f"{url}/v1/")
    assert runner.limit == 5000
    assert runner.encode("ab") == [97, 98]
    assert runs._leading(runner) == [1]
    task = Task("planted", [1, 2, 3], ["5"], 7)
    assert runner.answer(task) == "first 3 7 0"
    runner.close()
    assert runners.ServerRunner(url, "named").answer(task).startswith("named ")


def test_the_command_asks_a_server(app, url, tmp_path):
    out, text = tmp_path / "rows.json", tmp_path / "text.txt"
    text.write_text(SETTINGS.text)
    arguments = ["eval", "--url", url, "--full-url", url, "--mode-name", "mine", "--lengths", "1000", "--count", "1"]
    arguments += ["--tasks", "planted,prose", "--text", str(text), "--json", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "prose stays empty" in result.output
    rows = json.loads(out.read_text())
    assert [(row["mode"], row["task"], row["right"], row["same_as_full"]) for row in rows] == [
        ("full", "planted", 0.0, None),
        ("full", "prose", None, None),
        ("mine", "planted", 0.0, 1.0),
        ("mine", "prose", None, None),
    ]


def test_a_server_that_is_not_there_is_told_in_one_line():
    with pytest.raises(ValueError, match=r"^retrieval: http://127.0.0.1:9 does not name its models"):
        runners.ServerRunner("http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"^retrieval: http://127.0.0.1:9/tokenize does not answer for model 'm'"):
        runners.ServerRunner("http://127.0.0.1:9", "m")


@pytest.fixture
def app():
    app = typer.Typer()
    app.callback()(lambda: None)
    cli_eval.register(app)
    return app


def test_the_command_writes_rows_and_shows_a_table(app, tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "EngineRunner", lambda model, mode, limit, options: FakeRunner(mode != "none"))
    out, text = tmp_path / "rows.json", tmp_path / "text.txt"
    text.write_text(SETTINGS.text)
    arguments = ["eval", "--model", "m", "--lengths", "1000", "--count", "1", "--tasks", "planted,prose"]
    result = CliRunner().invoke(app, [*arguments, "--modes", "none", "--text", str(text), "--json", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    assert [(row["mode"], row["task"]) for row in rows] == [
        (mode, task) for mode in ("full", "none") for task in ("planted", "prose")
    ]
    assert "planted" in result.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name a model"),
        (["--model", "m", "--modes", "fast"], "fast is not among"),
        (["--model", "m", "--tasks", "sums"], "sums is not among"),
        (["--model", "m", "--lengths", "8k"], "token counts"),
        (["--model", "m", "--options", "[]"], "JSON object"),
        (["--full-url", "http://a"], "needs --url"),
    ],
)
def test_wrong_options_are_refused(app, arguments, told):
    result = CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert told in result.output


def test_an_error_is_one_line(app, tmp_path, monkeypatch):
    def start(model, mode, limit, options):
        raise ValueError("1 validation error for ModelConfig\n  Value error, too long [type=value_error]\n  see docs")

    monkeypatch.setattr(runners, "EngineRunner", start)
    (tmp_path / "text.txt").write_text("text")
    arguments = ["eval", "--model", "m", "--text", str(tmp_path / "text.txt")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert result.output.strip().splitlines()[-1].strip() == "too long [type=value_error]"
