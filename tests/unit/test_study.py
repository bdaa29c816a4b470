# SPDX-License-Identifier: Apache-2.0
"""index-study on the small capture in tests/data: rows, table, plot and JSON as a user gets them."""

import json
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_retrieval_attn.baselines.registry import KINDS
from vllm_retrieval_attn.bench.capture_file import load
from vllm_retrieval_attn.bench.study import Row, study, summary
from vllm_retrieval_attn.cli import app
from vllm_retrieval_attn.index.scan import CAN_SCAN

CAPTURE = Path(__file__).parent.parent / "data/smollm2.npz"
ROWS = [64, 128, 256, 512, 1024]


def sampled(**options) -> dict[tuple[str, float], dict]:
    """What `attention` comes to, by (via, rows)."""
    found = study(load(CAPTURE), ["attention"], [], timed=False, **{"rows": ROWS} | options)
    return {(line["via"], line["budget"]): line for line in summary(found)}


@pytest.fixture(scope="module")
def attention():
    return study(load(CAPTURE), ["attention"], [], ROWS, timed=False)


@pytest.fixture(scope="module")
def lines(attention):
    compared = study(load(CAPTURE), list(KINDS), [0.05, 0.3], ROWS, most=8, timed=False)
    return {(line["kind"], line["via"], line["budget"]): line for line in summary(attention + compared)}


def test_every_kind_to_compare_with_gets_better_with_its_budget_and_flat_is_exact(lines):
    flat = lines["flat", "", None]
    assert flat["recall_mean"] == pytest.approx(1)
    assert flat["mass"] == pytest.approx(1)
    assert flat["rows_mean"] == 3360
    assert flat["output_error"] < 1e-3
    assert abs(flat["lse_bias"]) < 1e-4
    for kind in set(KINDS) - {"flat"}:
        low, high = lines[kind, "", 0.05], lines[kind, "", 0.3]
        for name in ("recall_mean", "mass", "rows_mean", "keys_scanned_share", "bytes_touched_share"):
            assert high[name] > low[name], (kind, name)
        assert high["output_error"] < low["output_error"], kind
        assert low["lse_bias"] < high["lse_bias"] < 0, kind  # what they leave out is missing


@pytest.mark.parametrize("via", ["sketch", "faiss"])
def test_errors_of_attention_fall_with_its_rows(lines, via):
    for fewer, more in pairwise(ROWS):
        low, high = lines["attention", via, fewer], lines["attention", via, more]
        assert high["output_error"] < 0.8 * low["output_error"], more
        assert high["error_worst"] < low["error_worst"], more
        assert high["recall_mean"] > low["recall_mean"], more
        assert high["bytes_touched_share"] > low["bytes_touched_share"], more


def test_attention_reads_the_rows_asked_for(attention):
    for row in attention:
        assert 0.9 * row.budget < row.rows_mean < 1.02 * row.budget + 2, row


def test_sampling_leaves_no_bias_of_any_head(attention):
    assert any(row.mass < 0.8 for row in attention)  # much is left out
    assert max(abs(row.lse_bias) for row in attention) < 0.005


@pytest.mark.parametrize("rows", ROWS)
def test_candidates_of_faiss_do_nearly_as_well_as_all_codes(lines, rows):
    faiss, sketch = (lines["attention", via, rows]["output_error"] for via in ("faiss", "sketch"))
    assert faiss < 1.3 * sketch
    assert faiss != sketch


@pytest.mark.skipif(not CAN_SCAN, reason="the processor has no AVX-512 VNNI")
@pytest.mark.parametrize("rows", [64, 256])
def test_products_of_whole_numbers_do_as_well_as_faiss(lines, rows):
    vnni, faiss = (lines["attention", via, rows]["output_error"] for via in ("vnni", "faiss"))
    assert vnni == pytest.approx(faiss, rel=0.1)


def test_attention_has_the_least_error_and_reads_the_least(lines):
    for via in ("sketch", "faiss"):
        mine = lines["attention", via, 256]
        for kind in ("ivf", "hnsw", "roar"):
            other = lines[kind, "", 0.3]
            assert mine["output_error"] < 0.8 * other["output_error"], kind
            assert mine["bytes_touched_share"] < other["bytes_touched_share"], kind


def test_few_candidates_cost_faiss_alone():
    few, many = (sampled(rows=[256], most=8, candidates=count) for count in (64, 4096))
    assert few["faiss", 256]["output_error"] > 1.5 * many["faiss", 256]["output_error"]
    assert few["sketch", 256]["output_error"] == many["sketch", 256]["output_error"]


def test_the_constant_rotation_is_another_space_and_not_far_off():
    learned, rotated = (sampled(rows=[256], learned=learned) for learned in (True, False))
    for place in (("sketch", 256), ("faiss", 256)):
        assert 1 < rotated[place]["output_error"] / learned[place]["output_error"] < 1.3


def test_queries_may_be_keys():
    found = sampled(rows=[256], most=8, queries="keys")
    for via in ("sketch", "faiss"):
        assert found[via, 256]["recall_mean"] > 0.9
        assert abs(found[via, 256]["lse_bias"]) < 0.005


def test_the_command_writes_rows_and_a_plot(tmp_path):
    out, png = tmp_path / "rows.json", tmp_path / "plot.png"
    arguments = ["--kinds", "flat,ivf,attention", "--budgets", "0.2", "--rows", "64,256", "--candidates", "512"]
    arguments += ["--most", "3", "--json", str(out), "--png", str(png)]
    result = CliRunner().invoke(app, ["index-study", "--qkv", str(CAPTURE), *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    places = [("flat", "", None), ("ivf", "", 0.2)]
    vias = ("sketch", "faiss", "vnni") if CAN_SCAN else ("sketch", "faiss")
    places += [("attention", via, rows) for via in vias for rows in (64, 256)]
    assert [(row["kind"], row["via"], row["budget"]) for row in found] == 4 * places
    assert all(set(row) == {field.name for field in fields(Row)} for row in found)
    assert all(row["us_per_query"] > 0 and row["build_ms_per_1k"] > 0 for row in found)
    assert png.read_bytes().startswith(b"\x89PNG")
    for name in ("flat", "ivf", *(f"attention {via}" for via in vias)):
        assert name in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "lsh"], "no index kind 'lsh': there are flat, ivf, hnsw, roar, attention"),
        (["--kinds", "flat,"], "no index kind ''"),
        (["--budgets", "2"], "shares above 0"),
        (["--budgets", "0"], "shares above 0"),
        (["--budgets", "nan"], "shares above 0"),
        (["--budgets", "few"], "few"),
        (["--rows", "0"], "whole numbers above 0"),
        (["--rows", "64,-1"], "whole numbers above 0"),
        (["--rows", "1.5"], "whole numbers above 0"),
        (["--candidates", "63"], "--candidates"),
        (["--most", "0"], "--most"),
        (["--queries", "both"], "decode or"),
    ],
)
def test_bad_input_is_refused_before_the_study(arguments, message, tmp_path):
    png = tmp_path / "plot.png"
    arguments = ["index-study", "--qkv", str(CAPTURE), "--png", str(png), *arguments]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output
    assert not png.exists()


def test_a_file_that_is_no_capture_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"nothing")
    result = CliRunner().invoke(app, ["index-study", "--qkv", str(tmp_path / "x.npz")])
    assert result.exit_code == 2
    assert "x.npz" in result.output.replace("\n", "")
