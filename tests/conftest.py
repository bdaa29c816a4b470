# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

import os
from pathlib import Path

from hypothesis import settings

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # before vLLM is imported: engines in this process
os.environ.setdefault("OMP_NUM_THREADS", "1")  # other engines run beside: tests/engines.py
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

# Engines of other tests run beside: how long an example takes says nothing. And who changes one thing is not to be told
# of a rare example of another (`pytest --hypothesis-profile=default` draws new ones).
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"

# E402: after the environment above, which vLLM reads when it is imported. F401: pytest finds them by their names here.
from tests.engines import engine_run, pytest_collection_modifyitems, started  # noqa: E402, F401
