# SPDX-License-Identifier: Apache-2.0
"""`vllm-retrieval fit-space` refuses wrong options before an engine starts; it learns in tests/e2e/test_index.py."""

import pytest
from typer.testing import CliRunner

from vllm_retrieval_attn.cli import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--options", "{"], "not JSON"), (["--text", "/nonexistent"], "does not exist"), ([], "Missing argument")],
)
def test_wrong_options_are_refused(arguments, message):
    model = [] if message == "Missing argument" else ["some-model"]
    result = CliRunner().invoke(app, ["fit-space", *model, *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output
