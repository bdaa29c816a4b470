# SPDX-License-Identifier: Apache-2.0
"""The process that is Ray's driver: starts Ray and the actors of a rank, and starts anew what dies.

A driver does not outlive its Ray, so the vLLM worker is none: it starts this program (workers/pool.py), writes one JSON
line, a :class:`Plan`, and leaves when its input ends. It writes JSON lines, ``{"event": ...}``:

- ``failed``, with ``error``: an actor did not start, and is started again. ``restarting``, with ``actor``: one died.
- ``ended``, with ``error``: why there will be no more events.
- ``beat``: every second, once Ray is there.

Everything that Ray started here dies with this process (PR_SET_PDEATHSIG, by Ray on Linux). Imports neither vLLM nor
torch.
"""

import json
import logging
import os
import secrets
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

from vllm_retrieval_attn.store.layout import Layout
from vllm_retrieval_attn.store.shared_file import SharedFile, process_start
from vllm_retrieval_attn.store.views import actor_word, polled_words

POLL_S, BEAT_S = 0.2, 1.0
FIRST_WAIT_S, MOST_WAIT_S = 0.2, 10.0
"""Before an actor that died is started again: twice as long each time, anew once it has lived for a minute."""
CALM_S = 60.0
MOST_LEAVE_S = 10.0
"""How long to end Ray in good order."""
_STORE_BYTES = 80 << 20
"""Of Ray's object store, which nobody uses: about the least that it takes."""


@dataclass(frozen=True)
class ActorSetup:
    """What an actor is told at its start.

    Attributes:
        path: shared file of the rank. layout: its shape.
        scale: softmax scale. candidates: best keys that a search returns for each query head.
        by_faiss: whether Faiss searches, also where the processor can do without (index/scan.py).
        spin_ns: see workers/lane.py. cpus: CPU numbers to run on; a vLLM CPU worker may have bound itself, and so its
            children.
    """

    path: str
    layout: Layout
    scale: float
    candidates: int
    by_faiss: bool
    spin_ns: int
    cpus: list[int]


@dataclass(frozen=True)
class Plan:
    """What the supervisor is told: what its actors are, and a running Ray to use, if not one of its own."""

    setup: ActorSetup
    ray_address: str | None

    def line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, line: str) -> "Plan":
        told = json.loads(line)
        setup = told["setup"]
        return cls(ActorSetup(**{**setup, "layout": Layout(**setup["layout"])}), told["ray_address"])


def _leave_out() -> None:
    """Keep a local Ray from starting what nobody needs here: autoscaler, dashboard, and what copies logs. It has no
    switch for them; if they are called otherwise in another version, they run, which costs memory."""
    from ray._private.node import Node

    for name in ("start_monitor", "start_api_server", "start_log_monitor"):
        if hasattr(Node, name):
            setattr(Node, name, lambda self, **how: None)


def _stay_on_loopback() -> None:
    """Have a local Ray listen on 127.0.0.1 alone: it does where that is its node's address, and takes another where
    it is told so. If the function is called otherwise in another version, Ray listens on all interfaces, as it does by
    default, and wants the token."""
    from ray._private import services

    if hasattr(services, "resolve_ip_for_localhost"):
        services.resolve_ip_for_localhost = lambda host: host


def ray_temp_dir() -> str | None:
    """Where a local Ray keeps sockets and logs; None: where it does by default. That folder may be another user's."""
    usual = Path(tempfile.gettempdir(), "ray")
    if os.access(usual if usual.exists() else usual.parent, os.W_OK | os.X_OK):
        return None
    return str(Path(tempfile.gettempdir(), f"ray-{os.getuid()}"))


def start_ray(address: str | None) -> None:
    """Connect to Ray, or start a local one.

    Raises:
        RuntimeError: it does not start.
    """
    if address is None:
        # A token of its own: Ray would look for one in the home folder, and not every user has a home. It reads this
        # when it is imported.
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would shoot actors when memory runs short; the arena counts against them though it is the server's.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is not None:
            ray.init(address=address, **quiet)
        else:
            _leave_out()
            _stay_on_loopback()
            ray.init(
                address="local", include_dashboard=False, configure_logging=False, object_store_memory=_STORE_BYTES,
                num_cpus=0, _node_ip_address="127.0.0.1", _temp_dir=ray_temp_dir(), **quiet,
            )  # fmt: skip
    except Exception as error:  # of any of Ray's many kinds
        where = f"at ray_address={address!r}" if address else "locally"
        raise RuntimeError(f"retrieval: Ray did not start {where}: {' '.join(str(error).split())}") from error


def parts_of_ray() -> list[tuple[int, int | None]]:
    """Process ids and starts of what a local Ray does not come back without."""
    children = psutil.Process().children()
    return [(child.pid, process_start(child.pid)) for child in children if child.name() in ("gcs_server", "raylet")]


class Host:
    """The Ray actor: a process that has a SearchActor, which Ray's driver need not import."""

    def __init__(self, setup: ActorSetup, actor: int) -> None:
        from vllm_retrieval_attn.workers.actor import SearchActor

        self._actor = SearchActor(setup, actor)

    def pid(self) -> int:
        """Process id; the call returns once the actor is attached."""
        return os.getpid()


class _Held:
    """One actor: Ray's handle, the call that is answered once it is attached, its process, and how it fared."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.pending: Any = None
        self.process: tuple[int, int | None] = (0, None)
        self.wait_s = FIRST_WAIT_S
        self.since = self.due = 0.0


class Supervisor:
    """The actors of a rank.

    Args:
        plan: what to run. events: where its events go.
    """

    def __init__(self, plan: Plan, events: TextIO) -> None:
        self._setup, self._events = plan.setup, events
        self._file = SharedFile.attach(plan.setup.path)
        self._words = polled_words(plan.setup.layout, self._file.map)
        self._held = [_Held() for _ in range(plan.setup.layout.actors)]

    def tell(self, event: str, **more: Any) -> None:
        print(json.dumps({"event": event, **more}), file=self._events, flush=True)

    def launch(self, actor: int) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        held = self._held[actor]
        self._words[actor_word(actor)] = 0
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote: Any = ray.remote(Host)
        held.handle = remote.options(num_cpus=0, scheduling_strategy=here, max_restarts=0).remote(self._setup, actor)
        held.pending, held.since = held.handle.pid.remote(), time.monotonic()

    def check(self) -> None:
        """Note who is attached, and start anew who died."""
        import ray

        pending = [held.pending for held in self._held if held.pending is not None]
        ready = set(ray.wait(pending, num_returns=len(pending), timeout=0)[0]) if pending else set()
        for actor, held in enumerate(self._held):
            if held.pending in ready:
                self._settle(actor, ray)
            elif held.due == 0 and self._is_gone(actor, held):
                held.pending = None
                self._words[actor_word(actor)] = 0
                self._again(held)
                self.tell("restarting", actor=actor)
            if held.due and time.monotonic() >= held.due:
                held.due = 0.0
                self.launch(actor)

    def _is_gone(self, actor: int, held: _Held) -> bool:
        """Whether its process has ended: between attaching and its answer, as it answered (then its start was never
        known), or later."""
        if held.pending is None:
            pid, known = held.process
            return known is None or process_start(pid) != known
        attached = int(self._words[actor_word(actor)])
        return attached != 0 and process_start(attached) is None

    def _settle(self, actor: int, ray: Any) -> None:
        held = self._held[actor]
        reference, held.pending = held.pending, None
        try:
            pid = ray.get(reference)
        except Exception as error:  # an actor's own, of any kind: it is started again
            # The last line of Ray's account is the actor's own exception.
            self.tell("failed", error=str(error).strip().rpartition("\n")[2])
            self._again(held)
        else:
            held.process = pid, process_start(pid)

    @staticmethod
    def _again(held: _Held) -> None:
        now = time.monotonic()
        if now - held.since > CALM_S:
            held.wait_s = FIRST_WAIT_S
        held.due, held.wait_s = now + held.wait_s, min(2 * held.wait_s, MOST_WAIT_S)

    def run(self, closing: threading.Event) -> None:
        """Until ``closing``."""
        for actor in range(len(self._held)):
            self.launch(actor)
        told, parts = 0.0, parts_of_ray()
        while not closing.wait(POLL_S):
            if gone := [pid for pid, started in parts if process_start(pid) != started]:
                raise RuntimeError(f"a process of Ray's is gone ({gone[0]})")
            self.check()
            if time.monotonic() - told > BEAT_S:
                told = time.monotonic()
                self.tell("beat")


def main() -> None:
    # Whatever prints to the standard output would be taken for an event.
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    plan, closing = Plan.of(sys.stdin.readline()), threading.Event()

    def await_end() -> None:
        sys.stdin.read()
        closing.set()
        time.sleep(MOST_LEAVE_S)
        os._exit(1)  # the main thread hangs, in a Ray that hangs

    threading.Thread(target=await_end, name="retrieval-input", daemon=True).start()
    try:
        start_ray(plan.ray_address)  # on the main thread: when that ends, so does what Ray starts
        Supervisor(plan, events).run(closing)
    except Exception as error:  # told, since nobody reads this process's traceback
        print(json.dumps({"event": "ended", "error": str(error)}), file=events, flush=True)
        raise
    finally:
        import ray

        ray.shutdown()


if __name__ == "__main__":
    main()
