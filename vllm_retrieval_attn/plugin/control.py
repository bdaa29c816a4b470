# SPDX-License-Identifier: Apache-2.0
"""What an operator may change in a vLLM worker while it serves: methods that vLLM's ``collective_rpc`` calls by name.

vLLM mixes the class into its worker's (``--worker-extension-cls``); a call waits for the step that runs.
"""

from vllm_retrieval_attn.plugin.worker import current_worker


class WorkerControl:
    """Methods of every rank."""

    def retrieval_restart(self, rank: int, number: int) -> bool | None:
        """End CPU worker ``number`` of a rank, so that its supervisor starts another.

        Returns:
            Whether it was there to be ended; None from other ranks, and where there is no such worker.
        """
        worker = current_worker()
        if worker is None or not worker.hosted or worker.rank != rank or not 0 <= number < worker.arena.layout.actors:
            return None
        return worker.pool.restart(number)

    def retrieval_fidelity(self, share: float) -> None:
        """Compare this share of decode steps with exact attention from now on."""
        worker = current_worker()
        if worker is not None and worker.sampler is not None:
            worker.sampler.share = share
