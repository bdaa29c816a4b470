# SPDX-License-Identifier: Apache-2.0
"""Our resolved knobs, as they travel in vLLM's config."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_retrieval_attn.core.config import ResolvedConfig

CONNECTOR = "RetrievalConnector"
EXTENSION = "vllm_retrieval_attn.plugin.control.WorkerControl"
"""What vLLM mixes into its workers' class."""


def find_resolved_config(vllm_config: "VllmConfig") -> "ResolvedConfig | None":
    """Our resolved knobs, or None where another backend serves."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        return None
    from vllm_retrieval_attn.core.config import KEY, ResolvedConfig

    knobs = transfer.kv_connector_extra_config.get(KEY)
    return None if knobs is None else ResolvedConfig.model_validate(knobs)


def resolved_config(vllm_config: "VllmConfig") -> "ResolvedConfig":
    """Our resolved knobs.

    Raises:
        ValueError: the engine was not configured through ``--attention-backend retrieval``.
    """
    config = find_resolved_config(vllm_config)
    if config is None:
        raise ValueError("retrieval: select the backend with --attention-backend retrieval, not through other options")
    return config
