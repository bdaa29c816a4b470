# SPDX-License-Identifier: Apache-2.0
"""The vLLM worker's hold on the CPU workers of its rank: starts their supervisor, watches both, gives up in the end.

Nothing here waits while requests are served. Whether workers are there is asked with every message, or every step
where a GPU posts (:meth:`WorkerPool.alive`); as long as they are not, the engine does their work itself.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from typing import Any

from vllm_retrieval_attn.core.config import ResolvedConfig
from vllm_retrieval_attn.store.layout import (
    ACTOR_DONE,
    MSG_STEP,
    WORD_CLIENT_PID,
    WORD_GIVEN_UP,
    WORD_SEQ,
    WORD_STOP,
    Layout,
)
from vllm_retrieval_attn.store.shared_file import process_start
from vllm_retrieval_attn.store.views import Views
from vllm_retrieval_attn.workers.supervisor import ActorSetup, Plan

logger = logging.getLogger("vllm.retrieval.workers")

_START_TIMEOUT_S = 300.0
"""The first start on a machine compiles the kernels."""
_START_TRIES = 3
_WATCH_S = 0.1
MOST_RESTARTS, RESTARTS_WITHIN_S = 5, 60.0
"""More restarts than that in so much time, and there will be no other."""
_CLOSE_S = 3.0
_SUPERVISOR_SILENT_S = 30.0
"""It starts Ray in a few seconds, and gives a sign of life every second afterwards."""


class WorkerPool:
    """The workers of one rank.

    Args:
        config: knobs. layout, views, path: the shared file of the rank. scale: softmax scale.

    Attributes:
        restarts: of workers and of their supervisor, ever, by reason (died, start, silent, asked, supervisor).
        gave_up: there will be no more.

    Raises:
        RuntimeError: they do not start.
    """

    def __init__(self, config: ResolvedConfig, layout: Layout, views: Views, path: str, scale: float) -> None:
        self._layout, self._views, self._silent_s = layout, views, config.worker_timeout_s
        setup = ActorSetup(path, layout, scale, config.candidates, config.scan == "faiss", config.spin_ns, config.cpus)
        self.plan = Plan(setup, config.ray_address)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._failures: list[str] = []
        self._recent: deque[float] = deque(maxlen=MOST_RESTARTS)
        self._silent: dict[int, tuple[int, float]] = {}
        self._known: dict[int, int] = {}
        self._down_since: float | None = None
        self._ended: dict[int, str] = {}
        self.restarts: Counter[str] = Counter()
        self.gave_up = False
        views.words[WORD_CLIENT_PID] = os.getpid()
        self._launch()
        self._await_start()
        if not self.alive():
            self.close()
            why = self._failures[-1] if self._failures else "no answer"
            raise RuntimeError(
                f"retrieval: not all of {layout.actors} CPU workers started ({why.removeprefix('retrieval: ')}); "
                "look at the logs under /tmp/ray/session_latest/logs"
            )
        self._watcher = threading.Thread(target=self._watch, name="retrieval-watch", daemon=True)
        self._watcher.start()

    def _await_start(self) -> None:
        """Until all workers are attached, or it has failed too often: Ray gives its own parts 30 s to start, which is
        little where all cores are busy."""
        deadline, heard = time.monotonic() + _START_TIMEOUT_S, 0
        while not self.alive() and time.monotonic() < deadline and len(self._failures) < _START_TRIES:
            time.sleep(0.02)
            code = self._supervisor.poll()
            if code is None:
                continue
            self._reader.join(1)  # it may be about to hear why
            if len(self._failures) == heard:
                self._failures.append(f"their supervisor ended with {code}")
            heard = len(self._failures)
            if heard < _START_TRIES:
                self._end_supervisor()
                self._launch()

    def _launch(self) -> None:
        for actor in range(self._layout.actors):
            self._views.words[self._views.actor_word(actor)] = 0
        # A session of its own: an interrupt from the terminal is the engine's to deal with.
        self._supervisor = subprocess.Popen(
            [sys.executable, "-P", "-m", "vllm_retrieval_attn.workers.supervisor"],  # -P: what lies around is no module
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._supervisor.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(self.plan.line(), file=self._supervisor.stdin, flush=True)
        self._heard = time.monotonic()
        self._reader = threading.Thread(target=self._read, args=(self._supervisor.stdout,), daemon=True)
        self._reader.start()
        threading.Thread(target=self._read_errors, args=(self._supervisor.stderr,), daemon=True).start()

    @staticmethod
    def _read_errors(lines: Any) -> None:
        """When a part of Ray dies, its driver writes whole logs; what matters comes as an event."""
        for line in lines:
            logger.debug("retrieval: supervisor: %s", line.rstrip())

    def _read(self, events: Any) -> None:
        for line in events:
            told = json.loads(line)
            self._heard = time.monotonic()
            if told["event"] in ("failed", "ended"):
                what = "a CPU worker did not start" if told["event"] == "failed" else "the CPU workers' supervisor ends"
                logger.error("retrieval: %s: %s", what, told["error"])
                self._failures.append(told["error"])
            if told["event"] == "failed":
                self._count("start")
            elif told["event"] == "restarting":
                reason = self._ended.pop(told["actor"], "died")
                logger.warning("retrieval: CPU worker %d ended (%s); restarting it", told["actor"], reason)
                self._count(reason)

    def _count(self, reason: str) -> None:
        """One more restart is about to happen; see whether it may."""
        with self._lock:
            self.restarts[reason] += 1
            if reason == "asked":
                return
            now = time.monotonic()
            many = len(self._recent) == MOST_RESTARTS and now - self._recent[0] < RESTARTS_WITHIN_S
            self._recent.append(now)
            if not many or self.gave_up:
                return
            self.gave_up = True
        logger.error(
            "retrieval: %d restarts of CPU workers within %.0f s: there will be no more. The engine attends to host "
            "memory itself, exactly and slowly, where the GPU has no codes; restart it once the cause is mended%s",
            MOST_RESTARTS, RESTARTS_WITHIN_S, f" ({self._failures[-1]})" if self._failures else "",
        )  # fmt: skip
        self._end_supervisor()

    def pids(self) -> list[int]:
        """Process ids of the workers; 0 for one that is not attached."""
        views = self._views
        return [int(views.words[views.actor_word(actor)]) for actor in range(self._layout.actors)]

    @property
    def supervisor_pid(self) -> int:
        return self._supervisor.pid

    def alive(self) -> bool:
        """Whether every worker is attached and lives."""
        return all(self.lives(pid) for pid in self.pids())

    def lives(self, pid: int) -> bool:
        """Whether a worker with this process id is attached and lives."""
        if pid == 0:
            return False
        started = process_start(pid)
        return started is not None and self._known.setdefault(pid, started) == started

    def _watch(self) -> None:
        wait_s = _WATCH_S
        while not self._closing.wait(_WATCH_S):
            try:
                self._note()
                silent = time.monotonic() - self._heard > _SUPERVISOR_SILENT_S
                if self.gave_up or self._closing.is_set() or (self._supervisor.poll() is None and not silent):
                    continue
                what = "is silent" if self._supervisor.poll() is None else f"ended ({self._supervisor.poll()})"
                logger.error("retrieval: the CPU workers' supervisor %s; restarting it", what)
                self._end_supervisor()
                self._count("supervisor")
                if not self.gave_up and not self._closing.wait(wait_s):
                    self._launch()
                    wait_s = min(2 * wait_s, 10.0)
            except Exception:  # whatever it is, the next look may restart workers, and serving does without them
                logger.exception("retrieval: watching the CPU workers failed")

    def _note(self) -> None:
        """Tell when workers go and when they are back; end those that have been silent for too long."""
        now = time.monotonic()
        if not self.alive():
            self._down_since = self._down_since or now
            self._give_up_step()
            return
        if self._down_since is not None:
            logger.warning("retrieval: CPU workers are back after %.1f s", now - self._down_since)
            self._down_since = None
        words, seq = self._views.words, int(self._views.words[WORD_SEQ])
        for actor, pid in enumerate(self.pids()):
            done = int(words[self._views.actor_word(actor, ACTOR_DONE)])
            if done == seq:
                self._silent.pop(actor, None)
            elif self._silent.get(actor, (done,))[0] != done:
                self._silent[actor] = done, now  # at work, and always behind: messages come one after the other
            elif now - self._silent.setdefault(actor, (done, now))[1] > self._silent_s:
                logger.error("retrieval: CPU worker %d has been silent for %.0f s; ending it", actor, self._silent_s)
                self._silent.pop(actor)
                self._end(actor, pid, "silent")

    def _give_up_step(self) -> None:
        """Workers are gone: a GPU that asks them is not to wait."""
        self._views.words[WORD_GIVEN_UP] = self._views.header[MSG_STEP]

    def restart(self, actor: int) -> bool:
        """End a worker; its supervisor starts another. False: it is not there, so it is being started or never will."""
        pid = self.pids()[actor]
        if not self.lives(pid):
            return False
        logger.warning("retrieval: CPU worker %d is to be restarted, as asked", actor)
        self._end(actor, pid, "asked")
        return True

    def _end(self, actor: int, pid: int, reason: str) -> None:
        self._ended[actor] = reason
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def silent(self) -> list[int]:
        """Workers that an earlier message waits for."""
        return list(self._silent)

    def _end_supervisor(self) -> None:
        """End it and its workers, whatever state they are in."""
        self._supervisor.kill()
        for pid in self.pids():
            if self.lives(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._give_up_step()
        self._supervisor.wait()
        assert self._supervisor.stdin is not None
        with contextlib.suppress(OSError):
            self._supervisor.stdin.close()

    def close(self) -> None:
        """Stop workers, supervisor and, if it is ours, Ray."""
        self._closing.set()
        self._views.words[WORD_STOP] = 1
        assert self._supervisor.stdin is not None
        with contextlib.suppress(OSError):
            self._supervisor.stdin.close()
        try:
            self._supervisor.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            logger.debug("retrieval: the CPU workers' supervisor does not leave; ending it")
        self._end_supervisor()
