# SPDX-License-Identifier: Apache-2.0
"""An engine inside this process, so that a benchmark or a test can look at scheduler, pages and arena."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Read when vLLM is imported: engine core and worker in this process.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@dataclass
class Answer:
    """One finished request.

    Attributes:
        tokens: generated ids. text: their text, empty without a tokenizer. finish: finish reason.
        times: seconds from arrival to each token. logprobs: top logprobs of each token, if asked for.
        retrieval: what the response says under ``kv_transfer_params``, if anything.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    times: list[float] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    retrieval: dict[str, Any] | None = None


class InProcessEngine:
    """``LLM(...)`` with a step loop of our own.

    Args:
        model: folder or name. retrieval: our knobs; None serves with ``backend`` instead.
        options: further arguments of ``vllm.LLM``.
    """

    def __init__(
        self,
        model: str,
        retrieval: dict[str, Any] | None = None,
        backend: str = "retrieval",
        **options: Any,
    ) -> None:
        from vllm import LLM

        if retrieval is not None:
            options["additional_config"] = {"retrieval": retrieval}
        self.llm = LLM(model, attention_backend=backend, **options)
        self.engine: Any = self.llm.llm_engine
        self.max_blocks: dict[str, int] = {}
        self._number = 0

    @property
    def scheduler(self) -> Any:
        return self.engine.engine_core.engine_core.scheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    def worker(self) -> Any:
        from vllm_retrieval_attn.plugin.worker import current_worker

        return current_worker()

    def held_blocks(self) -> dict[str, list[int]]:
        """Paged blocks that each live request holds, one number a KV cache group."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        held: dict[str, list[int]] = {}
        for number, manager in enumerate(managers):
            for request, blocks in manager.req_to_blocks.items():
                row = held.setdefault(request, [0] * len(managers))
                row[number] = sum(not block.is_null for block in blocks)
        return held

    def add(self, prompt: list[int], **sampling: Any) -> str:
        """Add a request; returns its id."""
        from vllm import SamplingParams

        self._number += 1
        name = f"r{self._number}"
        self.engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(**sampling))
        return name

    def steps(self) -> Iterator[list[Any]]:
        """Step until nothing is left, yielding each step's outputs; keeps ``max_blocks`` up to date."""
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            for request, row in self.held_blocks().items():
                self.max_blocks[request] = max(self.max_blocks.get(request, 0), *row)
            yield outputs

    def drain(self) -> None:
        """Empty steps until the worker has heard of every end."""
        core = self.engine.engine_core.engine_core
        while core.scheduler.has_requests():
            self.engine.step()

    def run(self, prompts: list[list[int]], **sampling: Any) -> list[Answer]:
        """Generate for all prompts at once; one Answer each (the first of n)."""
        begin = time.perf_counter()
        names = [self.add(prompt, **sampling) for prompt in prompts]
        answers = {name: Answer() for name in names}
        for outputs in self.steps():
            now = time.perf_counter() - begin
            for output in outputs:
                answer, found = answers[output.request_id], output.outputs[0]
                new = len(found.token_ids) - len(answer.tokens)
                answer.tokens = list(found.token_ids)
                answer.times += [now] * new
                answer.text, answer.finish = found.text, found.finish_reason
                answer.retrieval = (output.kv_transfer_params or {}).get("retrieval")
                if found.logprobs:
                    answer.logprobs = [{token: p.logprob for token, p in row.items()} for row in found.logprobs]
        self.drain()
        return [answers[name] for name in names]

    def close(self) -> None:
        """End the engine; what it held on the host is gone afterwards."""
        self.engine.engine_core.shutdown()
