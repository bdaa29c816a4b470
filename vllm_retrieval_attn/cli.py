# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-retrieval``."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_retrieval_attn import __version__, cli_bench, cli_eval, cli_fit, cli_study
from vllm_retrieval_attn.cli_arguments import first_line, model_there
from vllm_retrieval_attn.plugin.version import VLLM

app = typer.Typer(help="RetrievalAttention for vLLM.", no_args_is_help=True)


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"vllm-retrieval {__version__} for vLLM {' or '.join(VLLM)}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """RetrievalAttention for vLLM."""


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Model folder or name; without one, only the machine.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a request, prompt and output.", min=1)] = 131_072,
    requests: Annotated[int, typer.Option(help="Requests of that length at once.", min=1)] = 1,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share the model.", min=1)] = 1,
    block_size: Annotated[int, typer.Option(help="Tokens of a paged block.", min=16)] = 16,
    chunk_tokens: Annotated[int, typer.Option(help="vLLM's --max-num-batched-tokens.", min=1)] = 8192,
) -> None:
    """Look whether this machine or container can serve, what a model needs at a context length, and what to set.

    Ends with status 1 if something is in the way of a server.
    """
    from vllm_retrieval_attn.doctor.checks import Verdict, checks

    if block_size % 16:
        raise typer.BadParameter(f"{block_size} is no multiple of 16; name one", param_hint="--block-size")
    console = Console()
    colours = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.STOP: "bold red"}
    table = Table(title="This machine", show_header=False)
    verdicts = set()
    for check in checks():
        verdicts.add(check.verdict)
        verdict = f"[{colours[check.verdict]}]{check.verdict.value}[/]"
        table.add_row(verdict, check.name, f"{check.found}\n-> {check.do}" if check.do else check.found)
    console.print(table)
    if model is not None:
        _size(console, model, context, requests, tensor_parallel, block_size, chunk_tokens)
    if Verdict.STOP in verdicts:
        raise typer.Exit(1)


def _size(
    console: Console, model: str, context: int, requests: int, tensor_parallel: int, block_size: int, chunk_tokens: int
) -> None:
    """What a model needs."""
    from vllm_retrieval_attn.core.config import RetrievalConfig
    from vllm_retrieval_attn.core.limits import available_cpus
    from vllm_retrieval_attn.doctor import sizing as find

    try:
        shape = find.model_shape(model_there(model), tensor_parallel)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"can not read the config of {model!r}: {first_line(error)}") from None
    need = find.needs(shape, context, requests, tensor_parallel, block_size, chunk_tokens, RetrievalConfig())
    table = Table(title=f"{model}: {requests} request(s) of {context:,} tokens")
    table.add_column("memory")
    table.add_column("GB", justify="right")
    table.add_row("KV cache of full attention, on each GPU", f"{need['full_gb']:.2f}")
    table.add_row("KV cache in pages with this backend, at most, on each GPU", f"{need['paged_gb']:.2f}")
    table.add_row("codes of the host's keys, on each GPU", f"{need['codes_gb']:.2f}")
    table.add_row("host memory", f"{need['host_gb']:.2f}")
    console.print(table)
    for line in find.advice(need, context, available_cpus(), tensor_parallel):
        console.print(f"- {line}")


cli_bench.register(app)
cli_eval.register(app)
cli_study.register(app)
cli_fit.register(app)


if __name__ == "__main__":
    app()
