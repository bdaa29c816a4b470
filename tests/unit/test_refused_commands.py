# SPDX-License-Identifier: Apache-2.0
"""What `vllm-retrieval` answers to wrong arguments: what is wrong, what to do, a status above 0 and no traceback."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm")

from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.cli import app

CAPTURE = str(Path(__file__).parents[1] / "data/smollm2.npz")
MODEL = "MODEL"  # replaced by a real one
REFUSED = {
    "no such command": (["serve"], "No such command 'serve'", ""),
    "no such option": (["doctor", "--contexts", "5"], "No such option: --contexts", "--context"),
    "doctor: no folder": (["doctor", "/nowhere"], "there is no folder '/nowhere'", "name a model's folder"),
    "doctor: empty folder": (["doctor", "empty"], "can not read the config of 'empty'", "config.json"),
    "doctor: broken config": (["doctor", "broken"], "can not read the config of 'broken'", "valid JSON"),
    "doctor: no tokens": (["doctor", MODEL, "--context", "0"], "--context", "greater than or equal to 1"),
    "doctor: no number": (["doctor", MODEL, "--requests", "few"], "--requests", "valid integer"),
    "doctor: no GPUs": (["doctor", MODEL, "--tensor-parallel", "0"], "--tensor-parallel", "greater than or equal to 1"),
    "doctor: block": (["doctor", MODEL, "--block-size", "24"], "--block-size", "multiple of 16"),
    "eval: no model": (["eval"], "--model", "name a model, or a server with --url"),
    "eval: no folder": (["eval", "--model", "./nowhere"], "there is no folder './nowhere'", "name a model's folder"),
    "eval: mode": (["eval", "--model", MODEL, "--modes", "ivf"], "--modes", "full, none, flat, attention"),
    "eval: no mode": (["eval", "--model", MODEL, "--modes", ","], "--modes", "full, none, flat, attention"),
    "eval: task": (["eval", "--model", MODEL, "--tasks", "x"], "--tasks", "planted, multikey"),
    "eval: count of a task": (["eval", "--model", MODEL, "--tasks", "crowd:x"], "--tasks", "a count of documents"),
    "eval: lengths": (["eval", "--model", MODEL, "--lengths", "4k"], "--lengths", "list of token counts"),
    "eval: count": (["eval", "--model", MODEL, "--count", "0"], "--count", "greater than or equal to 1"),
    "eval: options": (["eval", "--model", MODEL, "--options", "{"], "--options", "not JSON"),
    "eval: a list": (["eval", "--model", MODEL, "--options", "[1]"], "--options", "must be a JSON object"),
    "eval: many digits": (["eval", "--model", MODEL, "--options", "9" * 5000], "--options", "not JSON"),
    "eval: knobs": (["eval", "--model", MODEL, "--options", '{"retrieval": 5}'], "--options", "JSON object"),
    "eval: no text": (["eval", "--model", MODEL, "--text", "none.txt"], "--text", "does not exist"),
    "eval: a folder": (["eval", "--model", MODEL, "--text", "empty"], "--text", "is a directory"),
    "eval: empty text": (["eval", "--model", MODEL, "--text", "empty.txt"], "--text", "name another"),
    "eval: no folder for rows": (["eval", "--model", MODEL, "--json", "no/rows.json"], "--json", "make it"),
    "eval: full alone": (["eval", "--model", MODEL, "--full-url", "http://x"], "--full-url", "needs --url"),
    "eval: no server": (["eval", "--url", "http://127.0.0.1:9"], "http://127.0.0.1:9", "Connection error"),
    "eval: no address": (["eval", "--url", "nonsense"], "nonsense", "Connection error"),
    "fit-space: no model": (["fit-space"], "Missing argument 'model'", ""),
    "fit-space: no folder": (["fit-space", "/nowhere"], "there is no folder '/nowhere'", "name a model's folder"),
    "fit-space: options": (["fit-space", MODEL, "--options", "{"], "--options", "not JSON"),
    "fit-space: a list": (["fit-space", MODEL, "--options", "[1]"], "--options", "must be a JSON object"),
    "fit-space: knobs": (["fit-space", MODEL, "--options", '{"retrieval": 5}'], "--options", "JSON object"),
    "fit-space: knob": (["fit-space", MODEL, "--options", '{"retrieval": {"rows": 0}}'], "retrieval: rows=0",
                        "greater than or equal to 1"),
    "fit-space: option": (["fit-space", MODEL, "--options", '{"dtyp": 1}'], "argument 'dtyp'", "unexpected"),
    "fit-space: empty text": (["fit-space", MODEL, "--text", "empty.txt"], "--text", "name another"),
    "fit-space: no text": (["fit-space", MODEL, "--text", "none.txt"], "--text", "does not exist"),
    "fit-space: tokens": (["fit-space", MODEL, "--tokens", "0"], "--tokens", "greater than or equal to 1"),
    "index-study: nothing": (["index-study"], "Missing option '--qkv'", ""),
    "index-study: no file": (["index-study", "--qkv", "none.npz"], "none.npz", "No such file"),
    "index-study: another file": (["index-study", "--qkv", "empty.txt"], "empty.txt", "not an .npz file"),
    "index-study: a folder": (["index-study", "--qkv", "empty"], "empty", "Is a directory"),
    "index-study: kind": (["index-study", "--qkv", CAPTURE, "--kinds", "lsh"], "'lsh'", "there are flat, ivf"),
    "index-study: budgets": (["index-study", "--qkv", CAPTURE, "--budgets", "some"], "--budgets", "shares above 0"),
    "index-study: a budget": (["index-study", "--qkv", CAPTURE, "--budgets", "2"], "--budgets", "at most 1"),
    "index-study: rows": (["index-study", "--qkv", CAPTURE, "--rows", "0"], "--rows", "whole numbers above 0"),
    "index-study: queries": (["index-study", "--qkv", CAPTURE, "--queries", "x"], "--queries", "decode or keys"),
    "index-study: layers": (["index-study", "--qkv", "new.npz", "--capture", MODEL, "--layers", "x"], "--layers",
                            "numbers of layers"),
    "index-study: no model": (["index-study", "--qkv", "new.npz", "--capture", "/nowhere"], "'/nowhere'",
                              "name a model's folder"),
    "index-study: no text": (["index-study", "--qkv", "new.npz", "--capture", MODEL, "--text", "none.txt"], "--text",
                             "does not exist"),
    "index-study: no folder for rows": (["index-study", "--qkv", CAPTURE, "--json", "no/rows.json"], "--json",
                                        "make it"),
    "index-study: no folder for the plot": (["index-study", "--qkv", CAPTURE, "--png", "no/plot.png"], "--png",
                                            "make it"),
    "bench: shape": (["bench", "decode", "--shape", "x"], "shapes are llama-3-8b", "ways are sketch"),
    "bench: way": (["bench", "decode", "--ways", "x"], "ways are sketch", "full-fp8"),
    "bench: contexts": (["bench", "decode", "--contexts", "4k"], "--contexts", "list of numbers"),
    "bench: tokens": (["bench", "decode", "--tokens", "1"], "--tokens", "greater than or equal to 12"),
    "bench: options": (["bench", "decode", "--options", "{"], "--options", "not JSON"),
    "bench: a list": (["bench", "prefill", "--options", "[1]"], "--options", "must be a JSON object"),
    "bench: option": (["bench", "decode", "--options", '{"dtyp": 1}'], "argument 'dtyp'", "unexpected"),
    "bench: no folder for rows": (["bench", "decode", "--json", "no/rows.json"], "--json", "make it"),
    "bench: no folder for the plot": (["bench", "sweep", "--plot", "no/plot.png"], "--plot", "make it"),
    "bench: no plot": (["bench", "timeline"], "Missing option '--plot'", ""),
    "bench: document": (["bench", "reuse", "--context", "0"], "--context", "greater than or equal to 1"),
    "bench: questions": (["bench", "reuse", "--questions", "0"], "--questions", "greater than or equal to 1"),
    "bench: reuse options": (["bench", "reuse", "--options", "5"], "--options", "must be a JSON object"),
    "bench: pairs": (["bench", "watch", "--tokenizer", MODEL, "--pairs", "3"], "--pairs", "5, 10 or 20"),
    "bench: knobs": (["bench", "watch", "--tokenizer", MODEL, "--knobs", "{"], "--knobs", "not JSON"),
    "bench: serve": (["bench", "watch", "--tokenizer", MODEL, "--serve", "'"], "--serve", "quotation"),
    "bench: tokenizer": (["bench", "watch", "--tokenizer", "/nowhere"], "'/nowhere'", "name a model's folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_answered(name, monkeypatch, tmp_path):
    words, what, do = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    words = [str(smollm2()) if word == MODEL else word for word in words]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "400", "TERM": "dumb"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (1, 2)
    assert "Traceback" not in done.output
    answers = [line for line in done.output.splitlines() if what in line and do in line]
    assert answers, done.output


@pytest.mark.parametrize(
    ("options", "what", "do"),
    [
        ({"dtype": "x"}, "dtype", "'bfloat16'"),
        ({"max_model_len": 9_000_000}, "max_model_len (9000000)", "VLLM_ALLOW_LONG_MAX_MODEL_LEN"),
        ({"kv_cache_dtype": "fp8"}, "retrieval: KV cache dtype fp8", "set --kv-cache-dtype auto"),
    ],
)
def test_what_vllm_refuses_is_told_in_its_first_line_that_says_something(options, what, do):
    done = CliRunner().invoke(app, ["fit-space", str(smollm2()), "--options", json.dumps(options)])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert what in done.output.splitlines()[-1]
    assert do in done.output.splitlines()[-1]
