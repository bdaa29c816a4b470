"""index-study on the small capture in tests/data: rows, table, plot and JSON as a user gets them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_retrieval_attn.bench.capture_file import load
from vllm_retrieval_attn.bench.study import study, summary
from vllm_retrieval_attn.cli import app
from vllm_retrieval_attn.index.registry import KINDS

CAPTURE = Path(__file__).parent.parent / "data/smollm2.npz"
KEYS = {
    "head", "kind", "budget", "recall_mean", "recall_p10", "mass", "output_error", "keys_scanned_share",
    "bytes_touched_share", "us_per_query", "build_ms_per_1k", "index_bytes_per_key",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return study(load(CAPTURE)[1:3], list(KINDS), [0.05, 0.3], most=8, timed=False)


def test_every_kind_gets_better_with_its_budget_and_flat_is_exact(rows):
    lines = {(line["kind"], line["budget"]): line for line in summary(rows)}
    flat = lines["flat", None]
    assert flat["recall_mean"] == pytest.approx(1)
    assert flat["output_error"] < 1e-3
    for kind in set(KINDS) - {"flat"}:
        low, high = lines[kind, 0.05], lines[kind, 0.3]
        assert high["recall_mean"] > low["recall_mean"], kind
        assert high["output_error"] < low["output_error"], kind
        assert high["keys_scanned_share"] > low["keys_scanned_share"], kind


def test_the_default_kind_has_the_least_error(rows):
    lines = {(line["kind"], line["budget"]): line for line in summary(rows)}
    for kind in ("ivf", "hnsw", "roar"):
        assert lines["attention", 0.3]["output_error"] < 0.8 * lines[kind, 0.3]["output_error"], kind


def test_the_command_writes_rows_and_a_plot(tmp_path):
    out, png = tmp_path / "rows.json", tmp_path / "plot.png"
    arguments = ["index-study", "--qkv", str(CAPTURE), "--kinds", "flat,attention", "--budgets", "0.2", "--most", "3"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(out), "--png", str(png)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert len(found) == 4 * (1 + 2)
    assert set(found[0]) >= KEYS
    assert all(row["us_per_query"] > 0 and row["build_ms_per_1k"] > 0 for row in found)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "attention" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "lsh"], "lsh"),
        (["--budgets", "2"], "shares above 0"),
        (["--queries", "both"], "decode or"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = CliRunner().invoke(app, ["index-study", "--qkv", str(CAPTURE), *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_a_file_that_is_no_capture_is_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"nothing")
    result = CliRunner().invoke(app, ["index-study", "--qkv", str(tmp_path / "x.npz")])
    assert result.exit_code == 2
