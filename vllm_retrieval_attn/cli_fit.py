# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-retrieval fit-space``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_retrieval_attn.cli_arguments import json_object, model_there, one_line_errors, text_of


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("fit-space")(fit_space)


def fit_space(
    model: Annotated[str, typer.Argument(help="Model folder or name.")],
    text: Annotated[
        Path | None,
        typer.Option(help="Text to learn from; default: Python's docstrings.", exists=True, dir_okay=False),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens to learn from, at most: as many as prompts will have.", min=1)
    ] = 32_768,
    again: Annotated[bool, typer.Option("--again", help="Learn anew where a space is kept already.")] = False,
    options: Annotated[str, typer.Option(help="JSON: arguments of vllm.LLM, as the server will have them.")] = "{}",
) -> None:
    """Learn the model's space, so that the server need not take it from its first long prompt."""
    from vllm_retrieval_attn.bench.engine import InProcessEngine
    from vllm_retrieval_attn.device.learning import LEARN_TOKENS

    model, arguments = model_there(model), json_object(options, "--options")
    content, console = text_of(text), Console()
    knobs = arguments.pop("retrieval", {})
    with one_line_errors():
        engine = InProcessEngine(model, knobs, **{"enforce_eager": True, "max_num_seqs": 2, **arguments})
    try:
        worker = engine.worker()
        if again:
            worker.space.forget()
        if worker.stats()["space"] == "rotation":
            prompt = engine.llm.get_tokenizer().encode(content)
            least = LEARN_TOKENS + worker.config.sink_end
            limit = min(tokens, engine.llm.model_config.max_model_len - 1)
            if min(len(prompt), limit) < least:
                raise typer.BadParameter(
                    f"{min(len(prompt), limit)} tokens are too few; it takes {least}: name a longer --text, or raise "
                    "--tokens or max_model_len in --options"
                )
            engine.run([prompt[:limit]], max_tokens=1)
        if worker.stats()["space"] != "learned":
            console.print("no space was learned; the log above says why", style="red")
            raise typer.Exit(1)
        console.print(f"the model's space is kept in {worker.space.path}", soft_wrap=True)
    finally:
        engine.close()
