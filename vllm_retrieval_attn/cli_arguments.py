# SPDX-License-Identifier: Apache-2.0
"""What several commands ask of their arguments, and how errors of a user's are told: in one line, no traceback."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console


def json_object(value: str, option: str) -> dict[str, Any]:
    """A JSON object that an option holds; under the key ``retrieval``, if there is one, another."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:  # ValueError: also of numbers with thousands of digits
        raise typer.BadParameter(f"not JSON: {error}", param_hint=option) from None
    if not isinstance(found, dict):
        raise typer.BadParameter("must be a JSON object", param_hint=option)
    if not isinstance(found.get("retrieval", {}), dict):
        raise typer.BadParameter("retrieval in it must be a JSON object", param_hint=option)
    return found


def text_of(file: Path | None) -> str:
    """The text that ``--text`` names; without one, Python's docstrings."""
    from vllm_retrieval_attn.evaluation.needles import filler

    text = filler() if file is None else file.read_text(errors="replace")
    if not text.strip():
        raise typer.BadParameter("the file is empty; name another", param_hint="--text")
    return text


def in_a_folder(path: Path | None) -> Path | None:
    """Callback of an option that names a file to write: hours of work would be lost where its folder is missing."""
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.absolute().parent}; make it, or name another")
    return path


def model_there(model: str) -> str:
    """A model that is a path must be a folder; Hugging Face would take it for a name and complain of its slashes."""
    if not model or (model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir()):
        raise typer.BadParameter(f"there is no folder {model!r}; name a model's folder, or its name on the hub")
    return model


def first_line(error: BaseException) -> str:
    """The line that says what is wrong; pydantic, which checks vLLM's options, puts it after a heading."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        told = first["msg"].removeprefix("Value error, ").partition("\n")[0]
        return f"{first['loc'][0]}: {told}" if first["loc"] else told
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("Value error, ")]
    return (ours or lines or [repr(error)])[0].removeprefix("Value error, ")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with status 1 and one line where what is asked for can not be done."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        if isinstance(error, TypeError) and "unexpected keyword argument" not in str(error):
            raise  # no option of vLLM's that is not there, but a fault of ours
        Console(stderr=True).print(first_line(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
