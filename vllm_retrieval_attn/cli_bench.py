# SPDX-License-Identifier: Apache-2.0
"""The commands ``vllm-retrieval bench``."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_retrieval_attn.cli_arguments import in_a_folder, json_object, model_there, one_line_errors

bench = typer.Typer(help="Decode steps, prefill and their parts, ours beside full attention.", no_args_is_help=True)

Shape = Annotated[str, typer.Option(help="Published shape, with dummy weights.")]
Ways = Annotated[
    str, typer.Option(help="sketch, faiss (codes on the CPU alone), flat, none, full, full-fp8 (fp8 KV cache).")
]
Contexts = Annotated[str, typer.Option(help="Prompt lengths, comma-separated.")]
Batches = Annotated[str, typer.Option(help="Equal requests at once, comma-separated.")]
RowLimits = Annotated[str, typer.Option(help="Host rows that a step reads for a KV head, comma-separated.")]
Tokens = Annotated[int, typer.Option(help="Output tokens.", min=12)]
Fill = Annotated[
    bool, typer.Option("--fill", help="Ways sketch and flat: noise for K and V, instead of computing the prompts.")
]
Plot = Annotated[Path, typer.Option(help="PNG to write.", dir_okay=False, callback=in_a_folder)]
Options = Annotated[str, typer.Option(help="JSON: arguments of vllm.LLM; key retrieval: our knobs.")]
Out = Annotated[Path | None, typer.Option("--json", help="Write the rows there.", dir_okay=False, callback=in_a_folder)]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.add_typer(bench, name="bench")


def _numbers(value: str, option: str) -> list[int]:
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{value!r} is not a comma-separated list of numbers", param_hint=option)
    return [int(part) for part in parts]


def _combined(contexts: str, batches: str, rows: str) -> list[tuple[int, int, int]]:
    """All combinations of the three lists."""
    numbers = _numbers(contexts, "--contexts"), _numbers(batches, "--batches"), _numbers(rows, "--rows")
    return list(itertools.product(*numbers))


def _ways(shape: str, ways: str) -> list[str]:
    from vllm_retrieval_attn.bench.decode import SHAPES, WAYS

    asked = [name.strip() for name in ways.split(",")]
    if shape not in SHAPES or not set(asked) <= WAYS.keys():
        raise typer.BadParameter(f"ways are {', '.join(WAYS)}; shapes are {', '.join(SHAPES)}")
    return asked


def _told(rows: Iterable[dict[str, Any]], out: Path | None) -> list[dict[str, Any]]:
    """All rows, each printed and written as it comes."""
    found: list[dict[str, Any]] = []
    with one_line_errors():
        for row in rows:
            found.append(row)
            print(json.dumps(row), flush=True)
            if out is not None:
                out.write_text(json.dumps(found, indent=1))
    return found


def refuse_slow_steps(rows: list[dict[str, Any]]) -> None:
    """End with an error where a step of the sketch was no graph or degraded, or read no row although its request left
    pages; and where CPU workers did not answer in half of the timed steps: the first ones of a model go without them,
    as its space is learned. Of ranks in processes of their own it is not known whether a step was a graph."""
    timed = [row for row in rows if row["step_ms_p50"] is not None]
    wrong = [
        row
        for row in timed
        if row["way"] == "sketch"
        and (row["graph"] not in (1, None) or row["degraded"] or (row["path"] != "paged" and not row["rows_mean"]))
    ]
    if wrong:
        print("not all steps were graphs that read rows:", *wrong, sep="\n")
    if alone := [row for row in timed if row["way"] == "faiss" and (row["degraded_share"] or 0) >= 0.5]:
        print("the CPU workers did not answer in half of the steps:", *alone, sep="\n")
    if wrong or alone:
        raise typer.Exit(1)


@bench.command()
def decode(
    shape: Shape = "llama-3-8b",
    ways: Ways = "sketch,full",
    contexts: Contexts = "1024,131072",
    batches: Batches = "1",
    rows: RowLimits = "512",
    tokens: Tokens = 48,
    fill: Fill = False,
    options: Options = "{}",
    out: Out = None,
) -> None:
    """Decode steps; one JSON row each. Fails if a step with a sketch was no graph, degraded, or read no row, or if
    CPU workers did not answer in half of the steps."""
    from vllm_retrieval_attn.bench.decode import Load, compare

    asked = _ways(shape, ways)
    loads = [Load(context, batch, tokens, limit) for context, batch, limit in _combined(contexts, batches, rows)]
    refuse_slow_steps(_told(compare(shape, asked, loads, json_object(options, "--options"), fill), out))


@bench.command()
def prefill(
    shape: Shape = "llama-3-8b",
    ways: Ways = "sketch,full",
    contexts: Contexts = "131072",
    options: Options = "{}",
    out: Out = None,
) -> None:
    """Time to first token of the first request of each length and of a later one; one JSON row each."""
    from vllm_retrieval_attn.bench.decode import Load, compare

    asked = _ways(shape, ways)
    loads = [Load(context, 1, 12, 512) for context in _numbers(contexts, "--contexts") for _ in range(2)]
    compared = compare(shape, asked, loads, json_object(options, "--options"))
    keys = ("backend", "way", "shape", "context", "ttft_s", "device")
    _told(
        ({**{key: row[key] for key in keys}, "request": ("first", "later")[number % 2]}
         for number, row in enumerate(compared)),
        out,
    )  # fmt: skip


@bench.command()
def sweep(
    plot: Plot,
    shape: Shape = "llama-3.2-1b",
    ways: Ways = "sketch",
    contexts: Contexts = "8192,16384,32768,65536,131072,262144,524288,1047552",
    batches: Batches = "1",
    rows: RowLimits = "512",
    options: Options = "{}",
    out: Out = None,
) -> None:
    """Decode steps over contexts up to a million tokens as a plot; prompts of ours are not computed (--fill)."""
    from vllm_retrieval_attn.bench.decode import Load, compare
    from vllm_retrieval_attn.bench.figures import plot_sweep

    asked = _ways(shape, ways)
    loads = [Load(context, batch, 32, limit) for context, batch, limit in _combined(contexts, batches, rows)]
    found = _told(compare(shape, asked, loads, json_object(options, "--options"), True), out)
    plot_sweep(found, plot)
    refuse_slow_steps(found)


@bench.command()
def reuse(
    shape: Shape = "llama-3-8b",
    context: Annotated[int, typer.Option(help="Tokens of a document.", min=1)] = 65_536,
    questions: Annotated[int, typer.Option(help="Asked at once.", min=1)] = 8,
    batch: Annotated[int, typer.Option(help="Requests that decode together.", min=1)] = 4,
    options: Options = "{}",
    out: Out = None,
) -> None:
    """What a second question on a document costs, several at once, and decode steps that share pages; JSON rows."""
    from vllm_retrieval_attn.bench.reuse import measure

    _ways(shape, "sketch")
    _told(measure(shape, context, questions, batch, json_object(options, "--options")), out)


@bench.command()
def watch(
    tokenizer: Annotated[str, typer.Option(help="Folder or name of a tokenizer.")],
    shape: Shape = "llama-3-8b",
    context: Annotated[int, typer.Option(help="Prompt tokens.", min=1)] = 32_000,
    tokens: Tokens = 300,
    rows: Annotated[int, typer.Option(help="Host rows that a step reads for a KV head.", min=1)] = 512,
    pairs: Annotated[int, typer.Option(help="Pairs of requests: 5, 10 or 20.")] = 10,
    knobs: Annotated[str, typer.Option(help="JSON: our knobs.")] = "{}",
    serve: Annotated[str, typer.Option(help="More arguments of `vllm serve`.")] = "",
    out: Out = None,
) -> None:
    """A decode step of a server while it is watched (metrics, events, page) and while it tells nothing."""
    import shlex
    import tempfile

    from vllm_retrieval_attn.bench.watch import Workload, measure

    if pairs not in (5, 10, 20):
        raise typer.BadParameter("must be 5, 10 or 20", param_hint="--pairs")
    _ways(shape, "sketch")
    try:
        arguments = shlex.split(serve)
    except ValueError as error:
        raise typer.BadParameter(f"{error}", param_hint="--serve") from None
    with tempfile.TemporaryDirectory() as folder:
        load = Workload(context, tokens, rows, pairs, json_object(knobs, "--knobs"))
        _told(measure(shape, model_there(tokenizer), load, Path(folder), arguments), out)


@bench.command()
def timeline(
    plot: Plot,
    contexts: Contexts = "131072",
    batches: Batches = "1",
    rows: RowLimits = "512,1024",
    out: Out = None,
) -> None:
    """When the kernels of one layer run inside a graph, as a picture; Llama-3-8B's shape. Needs no vLLM."""
    from vllm_retrieval_attn.bench import kernels
    from vllm_retrieval_attn.bench import timeline as stamps
    from vllm_retrieval_attn.bench.figures import plot_timeline

    asked = [
        kernels.options().parse_args(["--tokens", str(context), "--rows-batch", str(batch), "--rows", str(limit)])
        for context, batch, limit in _combined(contexts, batches, rows)
    ]
    plot_timeline(_told(map(stamps.measure, asked), out), plot)
