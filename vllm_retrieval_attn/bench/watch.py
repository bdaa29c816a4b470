# SPDX-License-Identifier: Apache-2.0
"""What being watched costs a decode step: `vllm-retrieval bench watch`.

One server, three ways by turns, one request at a time: this backend gathers nothing (*silent*, switched by
bench/watch_control.py), it gathers metrics that nobody reads (*unread*), or events, tables and `/metrics` are read as
the page and Prometheus do (*watched*). Two servers would differ by more than what watching costs, by where their memory
lies (docs/benchmarks.md, 2026-11-27).
"""

import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vllm_retrieval_attn.bench.decode import _LEAST_TAU, _prompt, write_shape
from vllm_retrieval_attn.bench.http import free_port, is_up

_START_S, _ANSWER_S = 300.0, 120.0
_SCRAPE_S = 1.0
CONTROL = "vllm_retrieval_attn.bench.watch_control.WatchControl"
_T95 = {4: 2.776, 9: 2.262, 19: 2.093}
"""Quantiles of Student's t for a 95 % interval, by degrees of freedom."""


class Workload(NamedTuple):
    """``pairs`` of requests of ``context`` prompt tokens and ``tokens`` steps that read ``rows`` host rows; ``knobs``:
    more of the servers'."""

    context: int
    tokens: int
    rows: int
    pairs: int
    knobs: dict[str, Any]


class Server:
    """`vllm serve` of a dummy model.

    Raises:
        RuntimeError: it does not start; the message ends with its log.
    """

    def __init__(self, model: Path, tokenizer: str, load: Workload, options: list[str]) -> None:
        self.port, self._log = free_port(), model / "log"
        self.url = f"http://127.0.0.1:{self.port}"
        knobs = {
            "host_memory_gb": 8, "rows": load.rows, "tau": _LEAST_TAU, "min_tau": _LEAST_TAU, "resident_tokens": 1024
        }  # fmt: skip
        knobs |= load.knobs
        drop = ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS", "VLLM_PLUGINS")
        environment = {name: value for name, value in os.environ.items() if name not in drop}
        environment |= {"VLLM_PLUGINS": "retrieval", "RETRIEVAL_VIEW_KEY": "view", "VLLM_SERVER_DEV_MODE": "1"}
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--tokenizer", tokenizer),
                *("--load-format", "dummy", "--attention-backend", "retrieval", "--served-model-name", "m"),
                *("--additional-config", json.dumps({"retrieval": knobs}), "--host", "127.0.0.1"),
                *("--max-model-len", str(load.context + load.tokens + 64), "--max-num-seqs", "2"),
                *("--port", str(self.port), "--worker-extension-cls", CONTROL, *options),
            ],
            stdout=self._log.open("w"), stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + _START_S
        while not is_up(self.url):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"a server did not start:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.5)

    def gather(self, wanted: bool) -> None:
        """Whether this backend gathers statistics from now on."""
        asked = {"method": "retrieval_gather", "args": [wanted]}
        request = urllib.request.Request(
            f"{self.url}/collective_rpc", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as reply:
            reply.read()

    def step_ms(self, prompt: list[int], tokens: int) -> float:
        """Median time between two tokens of an answer, in ms."""
        asked = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        times = []
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
        steps = [after - before for before, after in itertools.pairwise(times)]
        return statistics.median(steps[len(steps) // 10 :]) * 1e3

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)


class Watcher:
    """Reads what a page and a Prometheus server read, until closed.

    Attributes:
        events: heard so far. scrapes: of /metrics.
    """

    def __init__(self, url: str) -> None:
        self._url, self._ended = f"{url}/retrieval", threading.Event()
        self._metrics = f"{url}/metrics"
        self.events = self.scrapes = 0
        self._stream = self._open("events")
        self._threads = [threading.Thread(target=task, daemon=True) for task in (self._listen, self._poll)]
        for thread in self._threads:
            thread.start()

    def _open(self, path: str) -> Any:
        request = urllib.request.Request(f"{self._url}/{path}", None, {"Authorization": "Bearer view"})
        return urllib.request.urlopen(request, timeout=30)

    def _listen(self) -> None:
        with self._stream as lines:
            for line in lines:
                self.events += line.startswith(b"event:")
                if self._ended.is_set():  # seen within a second: the status comes so often
                    return

    def _poll(self) -> None:
        while not self._ended.wait(_SCRAPE_S):
            with contextlib.suppress(OSError):
                for path in ("workers", "requests"):
                    with self._open(path) as reply:
                        reply.read()
                with urllib.request.urlopen(self._metrics, timeout=30) as reply:
                    self.scrapes += b"vllm:retrieval_rows_read_total" in reply.read()

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(10)


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % confidence interval of their mean, by Student's t; for 5, 10 or 20 differences."""
    mean = statistics.fmean(differences)
    half = _T95[len(differences) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    return mean - half, mean + half


def measure(shape: str, tokenizer: str, load: Workload, folder: Path, options: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each turn, then two with the interval of a difference.

    Args:
        shape: of decode.SHAPES; its vocabulary becomes the tokenizer's. folder: for the model and logs.
        options: more arguments of `vllm serve`.
    """
    from transformers import AutoTokenizer

    model = write_shape(shape, folder)
    config = json.loads((model / "config.json").read_text())
    config["vocab_size"] = words = len(AutoTokenizer.from_pretrained(tokenizer))
    (model / "config.json").write_text(json.dumps(config))
    with contextlib.closing(Server(model, tokenizer, load, options)) as server:
        prompt = _prompt(load.context, words, 1)
        for _ in range(2):  # later requests find the prompt's prefix; the first ones of them warm up
            server.step_ms(prompt, load.tokens)
        read = Counter[str]()

        def step(gather: bool) -> float:
            server.gather(gather)
            return server.step_ms(prompt, load.tokens)

        def watched() -> float:
            server.gather(True)
            with contextlib.closing(Watcher(server.url)) as watcher:
                took = server.step_ms(prompt, load.tokens)
            read.update(events=watcher.events, scrapes=watcher.scrapes)
            return took

        ways: dict[str, Callable[[], float]] = {
            "silent": lambda: step(False),
            "unread": lambda: step(True),
            "watched": watched,
        }
        found: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(load.pairs):
            for way in list(ways)[:: 1 if turn % 2 else -1]:
                found[way].append(ways[way]())
            yield {"row": "turn", **{f"{way}_ms": round(times[-1], 4) for way, times in found.items()}}
        for other in ("unread", "silent"):
            low, high = interval([mine - its for mine, its in zip(found["watched"], found[other], strict=True)])
            usual = statistics.fmean(found[other])
            yield {
                "row": f"watched less {other}", "pairs": load.pairs, "step_ms": round(usual, 4),
                "interval_ms": [round(low, 4), round(high, 4)],
                "interval": [f"{low / usual:+.2%}", f"{high / usual:+.2%}"], **read,
            }  # fmt: skip
