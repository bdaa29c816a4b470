# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-retrieval index-study``."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_retrieval_attn.cli_arguments import first_line, in_a_folder, model_there, text_of
from vllm_retrieval_attn.cli_progress import counting_progress

_LEGEND = """\
recall: @100, and mass: of the rows read; error: of the merged output; worst: of the worst tenth of the heads;
bias: of the log-sum-exp. budget: rows asked for, or the share of keys to score. keys, bytes: scored and read,
of all keys and of their fp16 bytes, those shared divided among the heads of a group. us: a query head, one
thread, cold cache. build: ms for 1,000 keys, one thread."""


def _shares(value: str) -> list[float]:
    try:
        shares = [float(share) for share in value.split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"--budgets are shares above 0, at most 1, comma-separated, not {value!r}")
    return shares


def _layers(value: str) -> list[int]:
    if not all(number.isdigit() for number in value.split(",")):
        raise ValueError(f"--layers are numbers of layers, comma-separated, not {value!r}")
    return [int(number) for number in value.split(",")]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("index-study")(index_study)


def index_study(
    qkv: Annotated[
        list[Path], typer.Option(help="Captures (.npz, docs/index-study.md); written first with --capture.")
    ],
    capture: Annotated[str | None, typer.Option(help="Capture from this model folder or name into --qkv.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to capture over; default: Python's docstrings.", exists=True, dir_okay=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Prompt tokens of a capture.", min=64)] = 8_000,
    layers: Annotated[str | None, typer.Option(help="Layers to capture, comma-separated; default: four.")] = None,
    kinds: Annotated[str, typer.Option(help="Kinds of index.")] = "flat,ivf,hnsw,roar,attention",
    budgets: Annotated[str, typer.Option(help="Shares of keys that kinds to compare with score.")] = "0.02,0.1,0.2,0.4",
    rows: Annotated[str, typer.Option(help="Rows that `attention` reads.")] = "128,256,512,1024",
    candidates: Annotated[int, typer.Option(help="Candidates of `attention` (`via` faiss).", min=64)] = 4096,
    learned: Annotated[bool, typer.Option(help="The learned space, or the constant rotation.")] = True,
    queries: Annotated[str, typer.Option(help="decode, or keys (in distribution).")] = "decode",
    most: Annotated[int, typer.Option(help="Test queries of each head.", min=1)] = 32,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write a row for each head here.", callback=in_a_folder)
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Plot; default: beside the first capture.", callback=in_a_folder)
    ] = None,
) -> None:
    """Compare kinds of index on real queries, keys and values: a table, a plot, and rows as JSON."""
    from vllm_retrieval_attn.bench import capture as capturing
    from vllm_retrieval_attn.bench.capture_file import load
    from vllm_retrieval_attn.bench.study import plot, study, summary

    # A terminal's width is the user's business; a file or a pipe gets whole lines.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        shares = _shares(budgets)
        if queries not in ("decode", "keys"):
            raise ValueError(f"--queries is decode or keys, not {queries}")
        if not all(limit.isdigit() and int(limit) for limit in rows.split(",")):
            raise ValueError("--rows are whole numbers above 0")
        limits = [int(limit) for limit in rows.split(",")]
        with counting_progress(console) as progress:
            if capture is not None:
                task = progress.add_task("capturing", total=None)
                capturing.capture(
                    model_there(capture),
                    None if text is None else text_of(text),
                    qkv[0],
                    tokens=tokens,
                    layers=None if layers is None else _layers(layers),
                    progress=lambda stage, done, total: progress.update(
                        task, description=f"capturing: {stage}", completed=done, total=total
                    ),
                )
            heads = [head for path in qkv for head in load(path)]
            task = progress.add_task("searching", total=len(heads))
            found = study(
                heads, kinds.split(","), shares, limits, queries, most, candidates, learned,
                advance=lambda name: progress.advance(task),
            )  # fmt: skip
    except (ValueError, OSError) as error:
        raise typer.BadParameter(first_line(error)) from None
    title = f"{len(heads)} KV heads, {queries} queries; means over heads"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for name in ("kind", "budget", "recall", "p10", "mass", "error", "worst", "bias", "rows", "keys", "bytes"):
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for name in ("us", "build", "B/key"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in summary(found):
        budget = line["budget"]
        table.add_row(
            f"{line['kind']} {line['via']}".strip(),
            "-" if budget is None else f"{budget:.0f}" if line["via"] else f"{budget:.0%}",
            *(f"{line[name]:.3f}" for name in ("recall_mean", "recall_p10", "mass")),
            *(f"{line[name]:.4f}" for name in ("output_error", "error_worst")),
            f"{line['lse_bias']:+.4f}",
            f"{line['rows_mean']:.0f}",
            *(f"{line[name]:.1%}" for name in ("keys_scanned_share", "bytes_touched_share")),
            *(f"{line[name]:.1f}" for name in ("us_per_query", "build_ms_per_1k", "index_bytes_per_key")),
        )
    console.print(table)
    console.print(_LEGEND)
    png = png or qkv[0].with_suffix(".png")
    plot(found, png)
    console.print(f"plot: {png}")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in found], indent=1))
