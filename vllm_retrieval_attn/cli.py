"""The command ``vllm-retrieval``."""

import os
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_retrieval_attn import cli_bench, cli_eval, cli_fit, cli_study

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
    table.add_row("codes of the host's keys, on each GPU", f"{need['codes_gb']:.2f}")
    table.add_row("host memory", f"{need['host_gb']:.2f}")
    console.print(table)
    for line in find.advice(need, context, len(os.sched_getaffinity(0)), tensor_parallel):
        console.print(f"- {line}")


cli_bench.register(app)
cli_eval.register(app)
cli_study.register(app)
cli_fit.register(app)


if __name__ == "__main__":
    app()
