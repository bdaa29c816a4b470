# SPDX-License-Identifier: Apache-2.0
"""A vLLM worker whose statistics can be switched off while it serves, for `vllm-retrieval bench watch`."""

from typing import Any

from vllm_retrieval_attn.plugin.connector import RetrievalConnector
from vllm_retrieval_attn.plugin.control import WorkerControl
from vllm_retrieval_attn.plugin.worker_stats import WorkerStats

_PARTS = (
    (RetrievalConnector, "get_kv_connector_stats"),
    (WorkerStats, "count"),
    (WorkerStats, "layer"),
    (WorkerStats, "step"),
)
_ORIGINAL = {(owner, name): getattr(owner, name) for owner, name in _PARTS}


def _nothing(*_: Any) -> None:
    return None


class WatchControl(WorkerControl):
    """For a single rank, whose worker is in the engine's process: there is the connector's scheduler half, too."""

    def retrieval_gather(self, gather: bool) -> None:
        """Gather statistics from now on, or none."""
        for (owner, name), original in _ORIGINAL.items():
            setattr(owner, name, original if gather else _nothing)
