# SPDX-License-Identifier: Apache-2.0
"""What reuse of a prefix saves: `vllm-retrieval bench reuse`. Dummy weights; documents of random tokens."""

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

from vllm_retrieval_attn.bench.decode import _SKIP, SHAPES, Load, _prompt, start
from vllm_retrieval_attn.bench.engine import InProcessEngine

_QUESTION = 64


def measure(shape: str, context: int, questions: int, batch: int, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows ``ask`` (a first question on a document, then another one), ``at once`` (several on a new document), and
    ``decode`` (steps of a batch of documents of their own, then with half of it on one document).

    Args:
        shape: of decode.SHAPES. context: tokens of a document. questions: at once. batch: requests that decode
            together.
    """
    loads = [Load(context + 2 * _QUESTION, max(questions, batch), 60, 512)]
    engine = start(shape, "sketch", loads, {"enable_prefix_caching": True, **options})
    try:
        bench = _Reuse(engine, SHAPES[shape]["vocab_size"], context)
        bench.ask(1000, 0)  # the space is learned from it, kernels are there
        yield from (bench.ask(1, number) for number in range(3))
        yield bench.at_once(questions)
        yield bench.decode(batch, shared=0)
        yield bench.decode(batch, shared=batch // 2)
    finally:
        engine.close()


class _Reuse:
    def __init__(self, engine: InProcessEngine, vocabulary: int, context: int) -> None:
        self._engine, self._words, self._context = engine, vocabulary, context
        self._seed = 10_000

    def _prompt(self, document: int, question: int) -> list[int]:
        return _prompt(self._context, self._words, document) + _prompt(_QUESTION, self._words, 100_000 + question)

    def _sampling(self, tokens: int) -> dict[str, Any]:
        return {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}

    def ask(self, document: int, question: int) -> dict[str, Any]:
        """One question."""
        prompt = self._prompt(document, question)
        (answer,) = self._engine.run([prompt], **self._sampling(2))
        cached = answer.retrieval["cached_tokens"] if answer.retrieval else 0
        return {
            "row": "ask", "context": self._context, "question": question, "ttft_s": round(answer.times[0], 4),
            "computed_tokens": len(prompt) - cached,
        }  # fmt: skip

    def at_once(self, questions: int) -> dict[str, Any]:
        """Several on a new document."""
        ledger = self._engine.scheduler.connector._ledger
        self._engine.scheduler.reset_prefix_cache(reset_connector=True)
        names = [self._engine.add(self._prompt(2, number), **self._sampling(16)) for number in range(questions)]
        most = 0
        for _ in self._engine.steps():
            most = max(most, ledger.pages - ledger.free_pages)
        self._engine.drain()
        return {
            "row": "at once", "context": self._context, "questions": len(names), "pages": most,
            "document_pages": -(-(self._context - ledger.split.sink_end) // ledger.page_tokens),
        }  # fmt: skip

    def decode(self, batch: int, shared: int) -> dict[str, Any]:
        """Steps of a batch, ``shared`` of it on one document."""
        self._seed += batch
        documents = [self._seed if number < shared else self._seed + number for number in range(batch)]
        prompts = [self._prompt(document, number) for number, document in enumerate(documents)]
        for prompt in prompts:  # so that the batch decodes together from the start
            self._engine.run([prompt], **self._sampling(1))
        names = [self._engine.add(prompt, **self._sampling(60)) for prompt in prompts]
        counts, stamps = dict.fromkeys(names, 0), []
        worker = self._engine.worker()
        graphs = worker.graph_steps
        for outputs in self._engine.steps():
            for output in outputs:
                counts[output.request_id] = len(output.outputs[0].token_ids)
            if min(counts.values()) and max(counts.values()) < 60:
                stamps.append(time.perf_counter())
        self._engine.drain()
        steps = [later - earlier for earlier, later in itertools.pairwise(stamps)][_SKIP:]
        return {
            "row": "decode", "context": self._context, "batch": batch, "shared": shared,
            "step_ms_p50": round(statistics.median(steps) * 1e3, 3), "steps": len(steps),
            "graph": worker.graph_steps - graphs >= len(steps),
        }  # fmt: skip
