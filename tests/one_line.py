# SPDX-License-Identifier: Apache-2.0
"""What every answer to a wrong configuration must be: one clear line that names what is wrong and says what to do."""

import math
from typing import Any

MOST = 500
"""Characters of a line that somebody reads."""


def assert_clear(text: str, *says: str) -> None:
    """One line of ours that says all of ``says``: the name of what is wrong, and what to do."""
    assert text.startswith("retrieval: ")
    assert "\n" not in text
    assert len(text) <= MOST
    assert [part for part in says if part not in text] == []


def cases(test: Any) -> int:
    """Cases of a parametrized test."""
    return math.prod(len(list(mark.args[1])) for mark in test.pytestmark if mark.name == "parametrize")
