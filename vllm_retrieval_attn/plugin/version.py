# SPDX-License-Identifier: Apache-2.0
"""The versions of vLLM that plugin/compat.py is written for."""

VLLM = ("0.32", "0.33")
