# SPDX-License-Identifier: Apache-2.0
"""What the routes tell, from what engines sent with their steps: nothing here waits for one."""

import time
from typing import Any

from vllm_retrieval_attn import __version__
from vllm_retrieval_attn.plugin.metric_names import COUNTERS, PATHS, RESTARTS, key
from vllm_retrieval_attn.plugin.stats import SCHEDULER, Told, told
from vllm_retrieval_attn.serving.drain import Drain
from vllm_retrieval_attn.serving.models import (
    Engine,
    EngineWorkers,
    Fidelity,
    Request,
    Requests,
    Status,
    Use,
    Worker,
    Workers,
)
from vllm_retrieval_attn.serving.problems import problems

FIGURES = ("recall", "mass", "output_error", "lse_bias")


def status(client: Any, drain: Drain) -> Status:
    """Everything at once. ``client``: vLLM's engine client."""
    config = client.vllm_config
    found, under_way = engines(), running(client)
    return Status(
        model=config.model_config.served_model_name or config.model_config.model,
        version=__version__,
        draining=drain.active,
        running=under_way,
        problems=problems(found, drain.active, under_way),
        engines=found,
    )


def running(client: Any) -> int:
    """Requests of this API server that are under way."""
    return int(client.output_processor.get_num_unfinished_requests())


def engines() -> list[Engine]:
    """Every engine that has told something."""
    return [_engine(number, one) for number, one in sorted(told.items())]


def _sum(total: dict[str, float], name: str) -> int:
    """A counter over all values of its label."""
    return int(sum(value for label, value in total.items() if label.partition("|")[0] == name))


def _workers(one: Told) -> Workers:
    now = one.now
    return Workers(
        wanted=int(now.get(key("workers", "wanted"), 0)),
        alive=int(now.get(key("workers", "alive"), 0)),
        restarts=_sum(one.total, "worker_restarts"),
        given_up=bool(now.get("workers_given_up", 0)),
    )


def _engine(number: int, one: Told) -> Engine:
    now, total = one.now, one.total
    taken = now.get("sample_timestamp_seconds")
    groups = sorted({name.partition("|")[2] for name in now if name.startswith("recall|")}, key=_first_layer)
    sketch = key("sketch_bytes", "capacity")
    return Engine(
        engine=number,
        healthy=bool(now.get("healthy", 0)),
        sample_age_s=None if taken is None else round(time.time() - taken, 3),
        workers=_workers(one),
        arena=Use(used=now.get(key("arena_bytes", "used"), 0), capacity=now.get(key("arena_bytes", "capacity"), 0)),
        sketch=Use(used=now[key("sketch_bytes", "used")], capacity=now[sketch]) if sketch in now else None,
        host_tokens=int(now.get("host_tokens", 0)),
        paged_tokens=int(now.get("paged_tokens", 0)),
        host_requests=int(now.get("host_requests", 0)),
        prefix_bytes=now.get("prefix_bytes", 0),
        prefix_hit_tokens=int(total.get("prefix_hit_tokens", 0)),
        steps={path: int(total.get(key("steps", path), 0)) for path in PATHS},
        rows_read=int(total.get("rows_read", 0)),
        searches=int(total.get("searches", 0)),
        codes_scored=int(total.get("codes_scored", 0)),
        layer_seconds=one.parts,
        requests_failed=_sum(total, "requests_failed"),
        requests_refused={
            reason: int(total.get(key("requests_refused", reason), 0)) for reason in COUNTERS["requests_refused"].values
        },
        compared_steps=int(total.get("compared_steps", 0)),
        fidelity=[Fidelity(layers=group, **{name: now[key(name, group)] for name in FIGURES}) for group in groups],
    )


def _first_layer(group: str) -> int:
    return int(group.partition("-")[0])


def workers() -> dict[int, EngineWorkers]:
    """CPU workers by engine, one by one."""
    return {
        number: EngineWorkers(
            **_workers(one).model_dump(),
            restarts_by_reason={why: int(one.total.get(key("worker_restarts", why), 0)) for why in RESTARTS},
            each=[
                Worker(rank=int(rank), **worker)
                for rank, lists in sorted(one.lists.items())
                for worker in lists.get("workers", [])
            ],
        )
        for number, one in sorted(told.items())
    }


def requests() -> Requests:
    """Requests of all engines."""
    now, live, ended = time.time(), [], []
    for number, one in told.items():
        for row in one.lists.get(SCHEDULER, {}).get("requests", []):
            live.append(Request(engine=number, seconds=round(now - row["arrived"], 3), **row))
        ended += [ended_request(number, row) for row in one.ended]
    newest = sorted(ended, key=lambda request: request.arrived + request.seconds, reverse=True)
    return Requests(live=live, ended=newest)


def ended_request(engine: int, row: dict[str, Any]) -> Request:
    """One that is over, as the scheduler half told it."""
    more = {name: value for name, value in row.items() if name not in ("finish", "paged_blocks")}
    return Request(engine=engine, state=row["finish"], **more)
