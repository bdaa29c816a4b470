"""The command ``vllm-retrieval``."""

import itertools
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_retrieval_attn import cli_eval, cli_fit, cli_study

app = typer.Typer(help="RetrievalAttention for vLLM.", no_args_is_help=True, add_completion=False)


@app.callback()
def _commands() -> None:
    """Keeps ``doctor`` a subcommand while it is one of few."""


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Model folder or name; without one, only the machine.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a request, prompt and output.", min=1)] = 131_072,
    requests: Annotated[int, typer.Option(help="Requests of that length at once.", min=1)] = 1,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share the model.", min=1)] = 1,
    block_size: Annotated[int, typer.Option(help="Tokens of a paged block.", min=16)] = 16,
    chunk_tokens: Annotated[int, typer.Option(help="vLLM's --max-num-batched-tokens.", min=1)] = 8192,
) -> None:
    """Show what is on this machine, what a model needs at a context length, and what to set."""
    from vllm_retrieval_attn import doctor as find
    from vllm_retrieval_attn.core.config import RetrievalConfig

    console = Console()
    found = Table(title="This machine", show_header=False)
    for name, value in find.machine().items():
        found.add_row(name, value)
    console.print(found)
    if model is None:
        return
    try:
        shape = find.model_shape(model, tensor_parallel)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"can not read the config of {model!r}: {str(error).splitlines()[0]}") from None
    need = find.needs(shape, context, requests, tensor_parallel, block_size, chunk_tokens, RetrievalConfig())
    table = Table(title=f"{model}: {requests} request(s) of {context:,} tokens")
    table.add_column("memory")
    table.add_column("GB", justify="right")
    table.add_row("KV cache of full attention, on each GPU", f"{need['full_gb']:.2f}")
    table.add_row("KV cache in pages with this backend, at most, on each GPU", f"{need['paged_gb']:.2f}")
    table.add_row("host memory", f"{need['host_gb']:.2f}")
    console.print(table)
    for line in find.advice(need, context, len(os.sched_getaffinity(0)), tensor_parallel):
        console.print(f"- {line}")


cli_eval.register(app)
cli_study.register(app)
cli_fit.register(app)


@app.command()
def bench(
    shape: Annotated[str, typer.Option(help="Published shape, with dummy weights.")] = "llama-3-8b",
    ways: Annotated[
        str, typer.Option(help="sketch, faiss (codes on the CPU alone), flat, none, full, full-fp8 (fp8 KV cache).")
    ] = "sketch,full",
    contexts: Annotated[str, typer.Option(help="Prompt lengths, comma-separated.")] = "1024,131072",
    batches: Annotated[str, typer.Option(help="Equal requests at once, comma-separated.")] = "1",
    rows: Annotated[str, typer.Option(help="Host rows that a step reads for a KV head, comma-separated.")] = "512",
    tokens: Annotated[int, typer.Option(help="Output tokens.", min=12)] = 48,
    fill: Annotated[
        bool, typer.Option("--fill", help="Ways sketch and flat: noise for K and V, instead of computing the prompts.")
    ] = False,
    options: Annotated[str, typer.Option(help="JSON: arguments of vllm.LLM; key retrieval: our knobs.")] = "{}",
    out: Annotated[Path | None, typer.Option("--json", help="Write the rows there.", dir_okay=False)] = None,
) -> None:
    """Decode steps and TTFT, ours beside full attention; one JSON row each. Fails if a step with a sketch was no graph,
    or read no row."""
    from vllm_retrieval_attn.bench.decode import SHAPES, WAYS, Load, compare

    asked = [name.strip() for name in ways.split(",")]
    if shape not in SHAPES or not set(asked) <= WAYS.keys():
        raise typer.BadParameter(f"ways are {', '.join(WAYS)}; shapes are {', '.join(SHAPES)}")
    numbers = [[int(part) for part in text.split(",")] for text in (contexts, batches, rows)]
    loads = [Load(context, batch, tokens, limit) for context, batch, limit in itertools.product(*numbers)]
    found: list[dict[str, Any]] = []
    for row in compare(shape, asked, loads, json.loads(options), fill):
        found.append(row)
        print(json.dumps(row), flush=True)
        if out is not None:
            out.write_text(json.dumps(found, indent=1))
    ours = [row for row in found if row["way"] == "sketch"]
    wrong = [row for row in ours if row["graph"] != 1 or (row["path"] != "paged" and not row["rows_mean"])]
    if wrong:
        print("not all steps were graphs that read rows:", *wrong, sep="\n")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
