# SPDX-License-Identifier: Apache-2.0
"""The entry point of ``vllm.endpoint_plugins``: vLLM loads it where ``VLLM_PLUGINS`` names ``retrieval``."""

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from vllm_retrieval_attn.plugin.resolved import find_resolved_config
from vllm_retrieval_attn.serving.control import control_router
from vllm_retrieval_attn.serving.drain import Drain, DrainGate
from vllm_retrieval_attn.serving.keys import both_keys
from vllm_retrieval_attn.serving.routes import router


class RetrievalEndpoints:
    """Routes under /retrieval, and the gate that keeps new requests out while the server drains."""

    name = "retrieval"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._drain = Drain()

    def attach_router(self, app: FastAPI) -> None:
        view, admin = both_keys()  # here: what fails in __init__ vLLM logs, and serves without the routes
        app.include_router(router(self._drain, view))
        app.include_router(control_router(self._drain, admin))
        app.add_middleware(DrainGate, drain=self._drain)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is None or find_resolved_config(engine_client.vllm_config) is None:
            raise ValueError(
                "retrieval: VLLM_PLUGINS names the routes of this backend, and the server runs without it; add "
                "--attention-backend retrieval, or take retrieval out of VLLM_PLUGINS"
            )
        self._drain.watch(engine_client)
