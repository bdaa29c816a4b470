# SPDX-License-Identifier: Apache-2.0
"""Streaming-input sessions on one engine with little host memory: run by test_sessions.py in a process of its own."""

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.evaluation.needles import filler

# Read when vLLM is imported: the worker shares the engine's process, so that one call sees ledger and arena.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

KNOBS = {
    "sink_tokens": 16,
    "window_tokens": 64,
    "index": "flat",
    "page_tokens": 64,
    "resident_tokens": 0,
    "host_memory_gb": 0.06,  # 20 pages of 64 tokens: a request ends at 1,296
    "threads": 1,
    "poison_freed": True,
}
NEW = 12
PATIENCE_S = 60.0


class Inspector:
    """Mixed into vLLM's worker, which the uniprocess executor has in the engine's process."""

    def held(self) -> dict[str, Any]:
        """What requests still hold: pages by the ledger's account, and what the worker's arena has given out."""
        from vllm_retrieval_attn.plugin.manager import RetrievalManager
        from vllm_retrieval_attn.plugin.worker import current_worker

        gc.unfreeze()  # vLLM hides what lived at start from the collector
        (manager,) = [found for found in gc.get_objects() if isinstance(found, RetrievalManager)]
        stats = current_worker().stats()
        return {
            "ledger": sum(map(manager.ledger.held_pages, manager.ledger.held)),
            "pages": stats["host_pages"],
            "stores": stats["requests"],
        }


def start() -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(smollm2()),
            attention_backend="retrieval",
            additional_config={"retrieval": KNOBS},
            worker_extension_cls="tests.e2e.sessions.Inspector",
            dtype="float32",
            max_model_len=8192,
            max_num_batched_tokens=128,
            max_num_seqs=8,
            block_size=16,
            kv_cache_memory_bytes=200 * 16 * 46_080,
            enforce_eager=True,
            distributed_executor_backend="uni",
            seed=0,
        )
    )


def greedy(new: int = NEW) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.CUMULATIVE
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, output_kind=kind)


class Session:
    """A streaming-input session that is fed by hand.

    Attributes:
        tokens: each finished chunk's tokens. finish: reason with which each ended. over: no more will come.
    """

    def __init__(self, engine: Any, name: str, new: int = NEW) -> None:
        self._chunks: asyncio.Queue[list[int] | None] = asyncio.Queue()
        self._ended: asyncio.Queue[None] = asyncio.Queue()
        self.tokens: list[list[int]] = []
        self.finish: list[str] = []
        self.over = False
        self._task = asyncio.create_task(self._run(engine, name, new))

    async def _inputs(self) -> AsyncIterator[Any]:
        from vllm.engine.protocol import StreamingInput

        while (chunk := await self._chunks.get()) is not None:
            yield StreamingInput({"prompt_token_ids": chunk})

    async def _run(self, engine: Any, name: str, new: int) -> None:
        sent = 0
        async for output in engine.generate(self._inputs(), greedy(new), name):
            answer = output.outputs[0]
            if answer.finish_reason is not None:
                self.tokens.append(list(answer.token_ids)[sent:])
                self.finish.append(answer.finish_reason)
                sent = len(answer.token_ids)
                self._ended.put_nowait(None)
        self.over = True
        self._ended.put_nowait(None)

    def feed(self, chunk: list[int]) -> None:
        self._chunks.put_nowait(list(chunk))  # vLLM appends later chunks to the first list

    async def ended(self, patience: float = PATIENCE_S) -> bool:
        """Wait for the end of the oldest chunk that nobody waited for; False if it does not come."""
        try:
            await asyncio.wait_for(self._ended.get(), patience)
        except TimeoutError:
            return False
        return True

    async def say(self, chunk: list[int]) -> bool:
        self.feed(chunk)
        return await self.ended()

    async def close(self) -> None:
        self._chunks.put_nowait(None)
        await asyncio.wait_for(self._task, PATIENCE_S)


async def plain(engine: Any, name: str, prompt: list[int], new: int = NEW) -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate({"prompt_token_ids": prompt}, greedy(new), name):
        tokens = list(output.outputs[0].token_ids)
    return tokens


async def in_one(engine: Any, name: str, chunks: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
    """What plain requests say to the tokens that a session had before each of its answers."""
    prompt: list[int] = []
    found = []
    for number, chunk in enumerate(chunks):
        prompt = prompt + chunk
        found.append(await plain(engine, f"{name}-{number}", prompt))
        prompt = prompt + answers[number][:-1]  # vLLM drops the last token that it sampled
    return found


async def left(engine: Any) -> dict[str, Any]:
    """What is held once nothing runs; the end of the last request takes a step to arrive."""
    for _ in range(50):
        (held,) = await engine.collective_rpc("held")
        if not any(held.values()):
            break
        await asyncio.sleep(0.1)
    return held


async def kept(engine: Any, ids: list[int]) -> dict[str, Any]:
    """A session of five chunks that outgrows sinks and window, beside a plain request that comes and goes."""
    chunks = [ids[start : start + 110] for start in range(0, 550, 110)]
    session = Session(engine, "kept")
    for chunk in chunks:
        await session.say(chunk)
        await plain(engine, "between", ids[700:1000], 2)  # takes whatever pages are free
    for _ in range(50):  # the plain request's end takes a step to arrive
        (between,) = await engine.collective_rpc("held")
        if between["stores"] == 1:
            break
        await asyncio.sleep(0.1)
    await session.close()
    at_end = await left(engine)
    want = await in_one(engine, "kept", chunks, session.tokens)
    return {"got": session.tokens, "want": want, "between": between, "left": at_end}


async def outgrown(engine: Any, ids: list[int]) -> dict[str, Any]:
    """A session that is fed more than host memory holds, and a short request right behind it."""
    session = Session(engine, "outgrown")
    for start in range(0, 1200, 400):
        await session.say(ids[start : start + 400])
    begin = time.monotonic()
    session.feed(ids[1200:1600])
    session.feed(ids[1600:1700])  # must not begin a new request under the old name
    short = await asyncio.wait_for(plain(engine, "short", ids[:50]), PATIENCE_S)
    await session.ended()
    seconds = time.monotonic() - begin
    await asyncio.wait_for(session._task, PATIENCE_S)
    at_end = await left(engine)
    return {
        "finish": session.finish,
        "over": session.over,
        "seconds_to_fail": seconds,
        "short": short,
        "left": at_end,
        "afterwards": await plain(engine, "afterwards", ids[:50]),
        "serves_long": len(await plain(engine, "long", ids[:1200])),
    }


async def crossed(engine: Any, ids: list[int]) -> dict[str, Any]:
    """Two sessions that together want more than there is: the one that yields is computed anew, and answers right."""
    chunks = [[ids[0:550], ids[550:800]], [ids[800:1350], ids[1350:1600]]]
    sessions = [Session(engine, f"crossed-{number}") for number in range(2)]
    for session, (chunk, _) in zip(sessions, chunks, strict=True):
        await session.say(chunk)
    for session, (_, chunk) in zip(sessions, chunks, strict=True):
        session.feed(chunk)
    while not any(len(session.tokens) > 1 for session in sessions):
        await asyncio.sleep(0.1)
    first = next(number for number in range(2) if len(sessions[number].tokens) > 1)
    other_waits = len(sessions[1 - first].tokens) == 1
    passing = await asyncio.wait_for(plain(engine, "passing", ids[:50]), PATIENCE_S)
    await sessions[first].close()
    while len(sessions[1 - first].tokens) < 2:
        await asyncio.sleep(0.1)
    await sessions[1 - first].close()
    got = [session.tokens for session in sessions]
    at_end = await left(engine)
    want = [await in_one(engine, f"one-{n}", chunks[n], got[n]) for n in range(2)]
    return {"got": got, "want": want, "waited": other_waits, "passing": len(passing), "left": at_end}


async def samples(engine: Any, ids: list[int]) -> dict[str, Any]:
    """Three samples of a prompt that takes more than half of host memory: one after the other."""
    from vllm.sampling_params import RequestOutputKind

    params = greedy()
    params.n, params.temperature, params.top_k = 3, 0.5, 1  # more than one sample must not be greedy
    params.output_kind = RequestOutputKind.FINAL_ONLY
    answers = [output async for output in engine.generate({"prompt_token_ids": ids[:800]}, params, "samples")]
    at_end = await left(engine)
    alone = await plain(engine, "sample", ids[:800])
    return {"got": [list(answer.token_ids) for answer in answers[-1].outputs], "want": [alone] * 3, "left": at_end}


async def run(parts: list[str]) -> dict[str, Any]:
    engine = start()
    ids = engine.get_tokenizer().encode(filler()[:20_000])
    found = {}
    for part in parts:
        begin = time.monotonic()
        found[part] = await asyncio.wait_for(PARTS[part](engine, ids), 300)
        found[part]["seconds"] = time.monotonic() - begin
    engine.shutdown()
    return found


PARTS = {"kept": kept, "outgrown": outgrown, "crossed": crossed, "samples": samples}


def main(out: Path, parts: list[str]) -> None:
    out.write_text(json.dumps(asyncio.run(run(parts or list(PARTS)))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
