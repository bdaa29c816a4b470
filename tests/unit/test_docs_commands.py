# SPDX-License-Identifier: Apache-2.0
"""Every command in the documentation is run by a test, or marked as not run by one."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from tests.unit.documents import BY_HAND, PAGES, ROOT, commands, fences, mentioned, name
from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.cli import app

ELSEWHERE = {
    "make setup": "Makefile",  # every test runs in what it made
    "make test": ".ci/run",
    "make demo": "tests/e2e/test_demo.py",
    "make serve": "tests/unit/test_demo.py",
    "make docs": "tests/unit/test_docs.py",
    "pip install .": "tests/integration/test_distributions.py",
    "pip install torch==2.13.0+cpu": "Makefile",
    "pip install ./deploy/cpu": "Makefile",
    "pip install -e .[cpu,dev]": "Makefile",
    "pip uninstall -y torchvision torchaudio torchcodec": "Makefile",
    "python examples/ask_a_file.py": "tests/e2e/test_serve.py",
    "python examples/openai_client.py": "tests/e2e/test_serve.py",
    "python examples/langchain_chat.py": "tests/e2e/test_serve.py",
    "python examples/batch.py": "tests/e2e/test_examples.py",
    "vllm-retrieval fit-space": "tests/e2e/test_index.py",
}
"""Commands that run in other tests, and where."""
ALL = sorted({tuple(words) for page in PAGES if name(page) not in BY_HAND for words in commands(page)})


def elsewhere(words):
    said = " ".join(words)
    return next(
        (place for command, place in ELSEWHERE.items() if said == command or said.startswith(f"{command} ")), None
    )


def serve(words):
    """All of a start but the engine: arguments, files, knobs, model."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = words[3:]
    if "--config" in options:
        place = options.index("--config")
        given = yaml.safe_load((ROOT / options[place + 1]).read_text())
        options[place : place + 2] = [
            f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items()
        ]
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    read = parser.parse_args(["--model", str(smollm2()), *options])
    read.max_model_len = min(read.max_model_len or 8192, 8192)  # the model's
    read.kv_cache_memory_bytes = 10**8
    config = json.loads(read.additional_config) if isinstance(read.additional_config, str) else read.additional_config
    config.get("retrieval", {}).pop("host_memory_gb", None)  # for a larger machine than this may be
    read.additional_config = config
    made = AsyncEngineArgs.from_cli_args(read).create_engine_config()
    assert made.kv_transfer_config.kv_connector == "RetrievalConnector"


def doctor(words):
    given = [str(smollm2()) if word == "MODEL" else word for word in words[1:]]
    done = CliRunner().invoke(app, given)
    assert not done.exception or isinstance(done.exception, SystemExit), done.output
    assert "host memory" in done.output


def helm(words):
    program = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
    if program is None:
        pytest.skip("no helm here (make tools fetches it)")
    assert words[1] == "install"
    done = subprocess.run([program, "template", *words[2:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


HERE = {"vllm serve": serve, "vllm-retrieval doctor": doctor, "helm install": helm}


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_a_command_is_run_here_or_elsewhere(words):
    place = elsewhere(words)
    if place is not None:
        assert (ROOT / place).exists()
        return
    run = HERE.get(" ".join(words[:2]))
    assert run is not None, "run it in a test, or mark it: # not run by a test: why"
    run(list(words))


def test_there_are_some():
    assert len(ALL) > 15


def test_what_elsewhere_lists_is_in_the_docs():
    unknown = [command for command in ELSEWHERE if not any(" ".join(words).startswith(command) for words in ALL)]
    assert unknown == ["make setup", "make docs"]  # named in sentences


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_what_they_hold(page):
    assert [text for language, text in fences(page) if language not in ("sh", "text", "python", "json")] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_and_json_in_blocks_can_be_read(page):
    for language, text in fences(page):
        if language == "python":
            compile(text.replace("...", "None"), str(page), "exec")
        if language == "json":
            json.loads(text)


def subcommand(words):
    """The command that the words after the program name, and what is left of them."""
    found = typer.main.get_command(app)
    while hasattr(found, "commands") and words and words[0].strip(",") in found.commands:
        found, words = found.commands[words[0].strip(",")], words[1:]
    return found, words


@pytest.mark.parametrize("page", [page for page in PAGES if name(page) not in BY_HAND], ids=name)
def test_what_sentences_mention_exists(page):
    for words in mentioned(page, "vllm-retrieval"):
        found, rest = subcommand(words[1:])
        options = {option for parameter in found.params for option in parameter.opts} | {"--help"}
        assert hasattr(found, "commands") is (len(words) == 1 or words[1].startswith("-")), words
        assert [word for word in rest if word.startswith("--") and word not in options] == [], words
    for words in mentioned(page, "python -m"):
        assert find_spec(words[2]), words
    for words in mentioned(page, "make"):
        assert re.search(rf"(?m)^{words[1]}:", (ROOT / "Makefile").read_text()), words
