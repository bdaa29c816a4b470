# SPDX-License-Identifier: Apache-2.0
"""What is not as it should be, and what to do about it; the alerts of deploy/monitoring say the same of metrics."""

from vllm_retrieval_attn.serving.models import Engine, Problem

NEARLY_FULL = 0.95
LARGE_ERROR = 0.1
SILENT_S = 30.0
"""Longer than a step of a long prefill takes."""


def problems(engines: list[Engine], draining: bool, running: int) -> list[Problem]:
    """Problems of a server, worst first."""
    found = []
    for engine in engines:
        found += _of_workers(engine) + _of_memory(engine) + _of_answers(engine, running)
    if draining:
        found.append(
            Problem(
                what=f"This server is draining: {running} requests run, new ones get 503.",
                do="Nothing, if that is meant; else POST /retrieval/undrain.",
            )
        )
    return found


def _of_workers(engine: Engine) -> list[Problem]:
    workers = engine.workers
    if workers.given_up:
        return [
            Problem(
                what="CPU workers died so often that they are not started again; the engine attends to host memory "
                "itself, slowly where the GPU has no codes.",
                do="Mend the cause that the log names ('retrieval:'), then restart the server.",
            )
        ]
    if workers.alive < workers.wanted:
        return [
            Problem(
                what=f"{workers.alive} of {workers.wanted} CPU workers are alive.",
                do="They are being restarted; if this lasts a minute, look for 'retrieval:' in the log.",
            )
        ]
    return []


def _of_memory(engine: Engine) -> list[Problem]:
    found = []
    if engine.arena.capacity and engine.arena.used > NEARLY_FULL * engine.arena.capacity:
        found.append(
            Problem(
                what="Host memory for K and V is nearly full: requests wait, or are preempted.",
                do="Raise host_memory_gb, or send fewer long requests at once.",
            )
        )
    if engine.sketch is not None and engine.sketch.used > NEARLY_FULL * engine.sketch.capacity:
        found.append(
            Problem(
                what="GPU memory for codes is nearly full: further requests are searched on the CPU, more slowly.",
                do="Raise sketch_gb, or lower gpu_memory_utilization's share for paged KV.",
            )
        )
    return found


def _of_answers(engine: Engine, running: int) -> list[Problem]:
    found = []
    worst = max((group.output_error for group in engine.fidelity), default=0.0)
    if worst > LARGE_ERROR:
        found.append(
            Problem(
                what=f"Attention of some layers differs from exact attention by {worst:.0%}.",
                do="Raise rows or lower tau (PATCH /retrieval/config), and watch this figure.",
            )
        )
    if running and engine.sample_age_s is not None and engine.sample_age_s > SILENT_S:
        found.append(
            Problem(
                what=f"Requests run, and the engine has told nothing for {engine.sample_age_s:.0f} s.",
                do="Look at the log and at GPU and CPU use; restart the server if it stays so.",
            )
        )
    return found
