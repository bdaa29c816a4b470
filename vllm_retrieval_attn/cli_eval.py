# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-retrieval eval``."""

import json
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_retrieval_attn.cli_arguments import in_a_folder, json_object, model_there, one_line_errors, text_of
from vllm_retrieval_attn.cli_progress import counting_progress


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("eval")(evaluate_modes)


def _names(value: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


def _one_of(value: str, known: tuple[str, ...], option: str) -> list[str]:
    names = _names(value)
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise typer.BadParameter(f"{', '.join(wrong) or 'nothing'} is not among {', '.join(known)}", param_hint=option)
    return names


def _counts(value: str) -> tuple[str, dict[str, int]]:
    """``task:count`` and ``task`` apart: the names alone, and the counts given."""
    names, counts = [], {}
    for part in _names(value):
        name, colon, count = part.partition(":")
        if colon and not (count.isdigit() and int(count) > 0):
            raise typer.BadParameter(f"{part!r} is not a task and a count of documents", param_hint="--tasks")
        names.append(name)
        counts.update({name: int(count)} if colon else {})
    return ",".join(names), counts


def _lengths(value: str) -> list[int]:
    names = _names(value)
    if not names or not all(name.isdigit() and int(name) > 0 for name in names):
        raise typer.BadParameter(f"{value!r} is not a comma-separated list of token counts", param_hint="--lengths")
    return [int(name) for name in names]


def evaluate_modes(
    model: Annotated[str | None, typer.Option(help="Model folder or name; with --url the served name.")] = None,
    modes: Annotated[
        str, typer.Option(help="full, none, flat, attention; full always runs, as the first.")
    ] = "full,none,flat,attention",
    tasks: Annotated[
        str,
        typer.Option(
            help="planted, multikey, crowd, multivalue, variables, frequent, prose; default: all. crowd:16 asks for "
            "16 documents, whatever --count says."
        ),
    ] = "",
    lengths: Annotated[str, typer.Option(help="Tokens of a request, prompt and answer, comma-separated.")] = "4096",
    count: Annotated[int, typer.Option(help="Documents a task and length.", min=1)] = 4,
    score_tokens: Annotated[int, typer.Option(help="Tokens of each prose document that are scored.", min=1)] = 48,
    seed: Annotated[int, typer.Option(help="Chooses documents, facts and questions.")] = 0,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file to make documents of; default: Python's docstrings.", exists=True, dir_okay=False),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Ask this vLLM server, http://host:port.")] = None,
    full_url: Annotated[str | None, typer.Option(help="Server with full attention to compare --url with.")] = None,
    mode_name: Annotated[str, typer.Option(help="What to call --url in the results.")] = "server",
    options: Annotated[str, typer.Option(help="JSON: arguments of vllm.LLM; key retrieval: our knobs.")] = "{}",
    out: Annotated[
        Path | None, typer.Option("--json", help="Write the rows there.", dir_okay=False, callback=in_a_folder)
    ] = None,
) -> None:
    """Quality beside full attention: RULER-like questions, perplexity and KL, in engines or on a server."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported: its warnings break the bar
    warnings.simplefilter("ignore", FutureWarning)
    from vllm_retrieval_attn.evaluation import evaluate as runs
    from vllm_retrieval_attn.evaluation import runners
    from vllm_retrieval_attn.evaluation.tasks import PROSE, TASKS

    tasks, counts = _counts(tasks)
    asked_tasks, asked_modes = (
        _one_of(tasks or ",".join(TASKS), TASKS, "--tasks"),
        _one_of(modes, runners.MODES, "--modes"),
    )
    asked_lengths, arguments = _lengths(lengths), json_object(options, "--options")
    if full_url is not None and (url is None or mode_name == runners.FULL):
        raise typer.BadParameter("needs --url, and a --mode-name other than full", param_hint="--full-url")
    if url is None and model is None:
        raise typer.BadParameter("name a model, or a server with --url", param_hint="--model")
    settings = runs.Settings(text_of(text), asked_tasks, asked_lengths, count, counts, seed, score_tokens)
    console = Console()
    with one_line_errors():
        if url is not None:
            starts = runners.servers(url, model, mode_name, full_url)
            if PROSE in settings.tasks:
                console.print("prose stays empty: a server can not be given the tokens of a text one by one")
        else:
            starts = runners.engines(model_there(str(model)), asked_modes, settings.lengths, arguments)
        rows = _run(console, starts, settings, out)
    console.print(runs.table(rows))


def _run(console: Console, starts: Any, settings: Any, out: Path | None) -> list[Any]:
    """Evaluate under a progress bar; ``out`` is written after each mode, so that a broken run leaves some."""
    from vllm_retrieval_attn.evaluation import evaluate as runs

    rows: list[runs.Row] = []
    with counting_progress(console) as progress:
        bar = progress.add_task("", total=runs.steps(starts, settings))

        def advance(what: str, done: int) -> None:
            progress.update(bar, description=what, advance=done)

        for row in runs.evaluate(starts, settings, advance):
            rows.append(row)
            if out is not None:
                out.write_text(json.dumps(rows, indent=1))
    return rows
