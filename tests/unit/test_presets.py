# SPDX-License-Identifier: Apache-2.0
"""The presets under configs/: vLLM knows their arguments, we their knobs, docs/knobs.md their names."""

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("vllm")

from vllm_retrieval_attn.core.config import parse

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_understood(path):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = yaml.safe_load(path.read_text())
    assert given["attention-backend"] == "retrieval"
    assert parse(json.loads(given["additional-config"]))
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    read = AsyncEngineArgs.from_cli_args(parser.parse_args(words))
    assert read.max_model_len == given.get("max-model-len")


def test_the_docs_name_them_all():
    page = (ROOT / "docs/knobs.md").read_text()
    assert [path.name for path in PRESETS if f"configs/{path.name}" not in page] == []
