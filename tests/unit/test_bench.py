# SPDX-License-Identifier: Apache-2.0
"""The commands `bench`: what they print, draw and refuse; engines are stood in for."""

import json
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from vllm_retrieval_attn.bench import decode
from vllm_retrieval_attn.bench import timeline as timeline_of
from vllm_retrieval_attn.cli import app
from vllm_retrieval_attn.cli_bench import refuse_slow_steps

LAYER = (("write_tokens", 0, 5), ("score_keys", 2, 35), ("weigh_keys", 36, 47), ("gather_rows", 48, 108.5),
         ("merge_parts", 109, 113))  # fmt: skip


def row(way, load, **changed):
    found = {
        "backend": decode.WAYS[way][0], "way": way, "shape": "tiny", "context": load.context, "batch": load.batch,
        "rows": load.rows, "ttft_s": 0.5, "step_ms_p50": 6 + load.context / 20_000, "gpu_bytes": 10**5 * load.context,
        "path": "sketch" if way == "sketch" else None, "rows_mean": 500.0, "graph": 1.0, "degraded": 0,
        "degraded_share": 0.0, "device": "none",
    }  # fmt: skip
    return {**found, **changed}


@pytest.fixture
def asked(monkeypatch):
    """Arguments of every comparison, which gives a row a load."""
    seen = []

    def compare(shape, ways, loads, options, filled=False):
        seen.append((shape, ways, loads, options, filled))
        for way in ways:
            yield from (row(way, load) for load in loads)

    monkeypatch.setattr(decode, "compare", compare)
    return seen


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_decode_prints_and_writes_a_row_for_each_load(asked, tmp_path):
    out = tmp_path / "rows.json"
    found = run("decode", "--contexts", "1024,8192", "--batches", "1,2", "--rows", "64", "--fill", "--json", str(out))
    assert found.exit_code == 0, found.output
    rows = [json.loads(line) for line in found.output.splitlines()]
    assert rows == json.loads(out.read_text())
    assert len(rows) == 8
    assert asked[0][1] == ["sketch", "full"]
    assert {(load.context, load.batch, load.rows) for load in asked[0][2]} == {
        (context, batch, 64) for context in (1024, 8192) for batch in (1, 2)
    }
    assert asked[0][4] is True


@pytest.mark.parametrize(
    "wrong", [("--contexts", "1k"), ("--ways", "sketch,other"), ("--shape", "none"), ("--rows", "0")]
)
def test_what_makes_no_sense_is_named(asked, wrong):
    found = run("decode", *wrong)
    assert found.exit_code == 2
    assert not asked


@pytest.mark.parametrize(("changed", "fails"), [
    ({}, False), ({"graph": 0.9}, True), ({"degraded": 2}, True), ({"rows_mean": 0}, True),
    ({"rows_mean": 0, "path": "paged"}, False),
])  # fmt: skip
def test_a_step_that_was_no_graph_or_read_nothing_fails(changed, fails):
    load = decode.Load(8192, 1, 20, 512)
    rows = [row("sketch", load, **changed), row("full", load, graph=None, rows_mean=None)]
    if not fails:
        refuse_slow_steps(rows)
        return
    with pytest.raises(typer.Exit):
        refuse_slow_steps(rows)


@pytest.mark.parametrize(("changed", "fails"), [
    ({"degraded": 20, "degraded_share": 0.4}, False), ({"degraded": 40, "degraded_share": 0.5}, True),
    ({"graph": 0.0}, False), ({"step_ms_p50": None, "degraded_share": 1.0}, False),
])  # fmt: skip
def test_steps_that_the_workers_did_not_answer_are_no_figure_of_theirs(changed, fails):
    rows = [row("faiss", decode.Load(8192, 1, 20, 512), **changed)]
    if not fails:
        refuse_slow_steps(rows)
        return
    with pytest.raises(typer.Exit):
        refuse_slow_steps(rows)


def test_prefill_asks_twice(asked):
    found = run("prefill", "--ways", "sketch", "--contexts", "4096")
    rows = [json.loads(line) for line in found.output.splitlines()]
    assert [(one["request"], one["ttft_s"], one["context"]) for one in rows] == [
        ("first", 0.5, 4096),
        ("later", 0.5, 4096),
    ]


def test_a_sweep_and_a_timeline_are_drawn(asked, monkeypatch, tmp_path):
    sweep, timeline = tmp_path / "sweep.png", tmp_path / "timeline.png"
    found = run("sweep", "--plot", str(sweep), "--ways", "sketch,full", "--batches", "1,4")
    assert found.exit_code == 0, found.output
    spans = timeline_of.layer_spans([timeline_of.Event(*kernel) for kernel in LAYER], 0)
    told = {"spans": spans, "layer_us": 113, "device": "a GPU"}
    monkeypatch.setattr(timeline_of, "measure", lambda args: {**vars(args), **told})
    found = run("timeline", "--plot", str(timeline), "--contexts", "131072,524288")
    assert found.exit_code == 0, found.output
    rows = [json.loads(line) for line in found.output.splitlines()]
    assert [(one["tokens"], one["rows"]) for one in rows] == [
        (131072, 512), (131072, 1024), (524288, 512), (524288, 1024)
    ]  # fmt: skip
    for picture in (sweep, timeline):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000


def test_spans_of_a_layer_are_those_of_its_kernels():
    others = [timeline_of.Event("flash", 47, 48), timeline_of.Event("product", 113, 120)]
    events = [*others]
    for layer in range(3):
        events += [timeline_of.Event(name, begin + 200 * layer, end + 200 * layer) for name, begin, end in LAYER]
    spans = timeline_of.layer_spans(reversed(events), 1)
    assert [(span["name"], span["begin_us"], span["end_us"]) for span in spans] == [
        (timeline_of.KERNELS[name], begin, end) for name, begin, end in LAYER
    ]
    with pytest.raises(ValueError, match="not whole"):
        timeline_of.layer_spans(events, 3)
    with pytest.raises(ValueError, match="not whole"):
        timeline_of.layer_spans([event for event in events if event.name != "score_keys"], 1)


def test_bytes_of_requests_are_those_of_their_blocks_and_codes():
    spec = SimpleNamespace(page_size_bytes=100)
    groups = [
        SimpleNamespace(kv_cache_spec=spec, layer_names=["a", "b"]),
        SimpleNamespace(kv_cache_spec=spec, layer_names=["c"]),
    ]
    engine = SimpleNamespace(
        scheduler=SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=groups)),
        held_blocks=lambda: {"r": [3, 4], "s": [1, 0]},
    )
    assert decode._held(engine, None) == {"gpu_bytes": 1200, "host_bytes": 0}
    sketch = SimpleNamespace(codes=SimpleNamespace(used=2), geometry=SimpleNamespace(sketch_page_bytes=1000))
    worker = SimpleNamespace(hosted=True, sketch=sketch, arena=SimpleNamespace(used_bytes=77))
    assert decode._held(engine, worker) == {"gpu_bytes": 3200, "host_bytes": 77}
