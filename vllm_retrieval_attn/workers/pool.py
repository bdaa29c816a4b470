"""Starts, watches and restarts the Ray actors of a rank."""

import logging
import os
import signal
import threading
import time
from typing import Any

from vllm_retrieval_attn.core.config import ResolvedConfig
from vllm_retrieval_attn.store.layout import ACTOR_DONE, WORD_CLIENT_PID, WORD_SEQ, WORD_STOP, Layout
from vllm_retrieval_attn.store.shared_file import process_start
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.actor import ActorSetup
from vllm_retrieval_attn.workers.client import WorkersUnavailable

logger = logging.getLogger("vllm.retrieval")

_START_TIMEOUT_S = 300.0
"""The first start on a machine compiles the kernels."""
_START_TRIES = 3
_WATCH_S = 0.25


def start_ray(address: str | None) -> bool:
    """Connect to Ray, or start a local one of our own; returns whether it is ours to end.

    Ray takes over signal handlers of a process that starts it; vLLM's are put back.
    """
    import ray

    if ray.is_initialized():
        return False
    handlers: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would shoot actors when memory runs short; the arena counts against them though it is the server's.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                object_store_memory=100 << 20,
            )
    except Exception as error:
        where = f"at ray_address={address!r}" if address else "locally"
        raise RuntimeError(f"retrieval: Ray did not start {where}: {error}") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return address is None


class ActorPool:
    """The actors of one rank.

    Args:
        config: knobs. layout, views, path: the shared file of the rank. scale: softmax scale.
    """

    def __init__(self, config: ResolvedConfig, layout: Layout, views: Views, path: str, scale: float) -> None:
        self._config, self._layout, self._views = config, layout, views
        self._setup = ActorSetup(path, layout, scale, config.candidates, config.spin_ns, config.cpus)
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._down_since: float | None = None
        self._last_error = ""
        self._failures = 0
        self.restarts = 0
        views.words[WORD_CLIENT_PID] = os.getpid()
        self._owns_ray = start_ray(config.ray_address)
        self._actors: list[Any] = [None] * layout.actors
        self._born: list[tuple[int, int | None]] = [(0, None)] * layout.actors
        self._pending: dict[int, Any] = {}
        for actor in range(layout.actors):
            self._launch(actor)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self._pending and time.monotonic() < deadline:
            self._settle(0.5)
            if self._failures >= _START_TRIES:
                break
        if self._pending:
            self.close()
            raise RuntimeError(
                f"retrieval: {len(self._pending)} of {layout.actors} CPU workers did not start "
                f"({self._last_error or 'no answer'}); look at the logs under /tmp/ray/session_latest/logs"
            )
        self._watcher = threading.Thread(target=self._watch, name="retrieval-watch", daemon=True)
        self._watcher.start()

    def _launch(self, actor: int) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from vllm_retrieval_attn.workers.actor import SearchActor

        self._views.words[self._views.actor_word(actor)] = 0
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        handle: Any = (
            ray.remote(SearchActor)
            .options(num_cpus=0, scheduling_strategy=here, max_restarts=0)
            .remote(self._setup, actor)
        )
        self._actors[actor] = handle
        self._pending[actor] = handle.pid.remote()

    def _settle(self, timeout: float) -> None:
        """Note the actors that have started; an actor that failed to start is launched again."""
        import ray

        ready, _ = ray.wait(list(self._pending.values()), num_returns=1, timeout=timeout)
        for actor, reference in list(self._pending.items()):
            if reference not in ready:
                continue
            del self._pending[actor]
            try:
                pid = ray.get(reference)
            except Exception as error:
                # The last line of Ray's account is the actor's own exception.
                self._last_error = str(error).strip().rpartition("\n")[2]
                self._failures += 1
                logger.error("retrieval: CPU worker %d did not start: %s", actor, self._last_error)
                time.sleep(0.2)
                self._launch(actor)
            else:
                self._born[actor] = (pid, process_start(pid))

    def pids(self) -> list[int]:
        """Process ids of the actors as last started."""
        return [pid for pid, _ in self._born]

    def _dead(self) -> list[int]:
        return [
            actor
            for actor, (pid, started) in enumerate(self._born)
            if actor not in self._pending and (started is None or process_start(pid) != started)
        ]

    def check(self) -> bool:
        """Restart what died; True when every actor is alive."""
        with self._lock:
            for actor in self._dead():
                if self._down_since is None:
                    self._down_since = time.monotonic()
                logger.warning("retrieval: CPU worker %d (pid %d) died; restarting it", actor, self._born[actor][0])
                self._launch(actor)
            if self._pending:
                self._settle(0.05)
            if self._pending or self._dead():
                return False
            if self._down_since is not None:
                self.restarts += 1
                logger.warning("retrieval: CPU workers are back after %.1f s", time.monotonic() - self._down_since)
                self._down_since = None
            return True

    def revive(self, late_since: float) -> float:
        """Called while an answer is late: replace the hung, restart the dead, give up in the end.

        Args:
            late_since: monotonic time from which the answer is awaited. A worker that lives but has not
                answered ``worker_timeout_s`` later is killed.

        Returns:
            The time from which the caller goes on counting: workers just replaced start afresh.

        Raises:
            WorkersUnavailable: the workers did not come back within ``restart_timeout_s``.
        """
        now = time.monotonic()
        if now - late_since > self._config.worker_timeout_s:
            with self._lock:
                self._kill_late()
        if self.check():
            return now if now - late_since > self._config.worker_timeout_s else late_since
        if not self.available():
            raise WorkersUnavailable(
                f"CPU workers did not come back within restart_timeout_s={self._config.restart_timeout_s:g} "
                f"({self._last_error or 'they are still starting'})"
            )
        return now

    def available(self) -> bool:
        """Whether to wait for an answer at all: not while workers are down for longer than the limit."""
        down = self._down_since
        return down is None or time.monotonic() - down <= self._config.restart_timeout_s

    def _kill_late(self) -> None:
        import ray

        words, seq = self._views.words, int(self._views.words[WORD_SEQ])
        for actor in range(self._layout.actors):
            if actor in self._pending or int(words[self._views.actor_word(actor, ACTOR_DONE)]) == seq:
                continue
            logger.error(
                "retrieval: CPU worker %d has not answered for %.0f s; replacing it",
                actor,
                self._config.worker_timeout_s,
            )
            ray.kill(self._actors[actor])
            pid, started = self._born[actor]
            deadline = time.monotonic() + 2
            while process_start(pid) == started and time.monotonic() < deadline:
                time.sleep(0.01)

    def _watch(self) -> None:
        """Notice deaths while no request waits."""
        while not self._closing.wait(_WATCH_S):
            try:
                self.check()
            except Exception as error:
                logger.error("retrieval: watching the CPU workers: %s", error)

    def close(self) -> None:
        """Stop actors, and Ray if it is ours."""
        self._closing.set()
        with self._lock:
            import ray

            self._views.words[WORD_STOP] = 1
            for handle in self._actors:
                try:
                    ray.kill(handle)
                except Exception as error:
                    logger.debug("retrieval: killing a CPU worker: %s", error)
            if self._owns_ray:
                ray.shutdown()
