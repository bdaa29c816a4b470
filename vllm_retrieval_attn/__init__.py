# SPDX-License-Identifier: Apache-2.0
"""RetrievalAttention for stock vLLM: contexts that GPU memory does not limit.

``vllm serve MODEL --attention-backend retrieval``. See README.md and docs/architecture.md.
"""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of group ``vllm.general_plugins``; vLLM calls it once in every process."""
    from vllm_retrieval_attn.plugin.compat import install

    install()
