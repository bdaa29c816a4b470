# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` as a user starts it: spawned processes, HTTP, streaming, errors, shared memory after the end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import openai
import psutil
import pytest
from transformers import AutoTokenizer

from tests.e2e import page
from vllm_retrieval_attn.bench.http import free_port, is_up
from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.evaluation.needles import questions
from vllm_retrieval_attn.plugin import metric_names as names

ROOT = Path(__file__).parents[2]


class Server:
    def __init__(self, log: Path) -> None:
        self.port = free_port()
        self.log = log
        vllm = str(Path(sys.executable).parent / "vllm")
        knobs = '{"retrieval": {"host_memory_gb": 0.12, "resident_tokens": 1024, "answer_timeout_s": 60}}'
        # The program must not see this test process's own setting.
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        environment |= {"VLLM_PLUGINS": "retrieval", "RETRIEVAL_VIEW_KEY": "view", "RETRIEVAL_ADMIN_KEY": "admin"}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # two threads would wait busily for each other
        self.process = subprocess.Popen(
            [
                *(vllm, "serve", str(smollm2()), "--attention-backend", "Retrieval", "--additional-config", knobs),
                *("--max-model-len", "8192", "--max-num-seqs", "4", "--enforce-eager", "--port", str(self.port)),
                *("--served-model-name", "m", "--host", "127.0.0.1", "--kv-cache-memory-bytes", "600000000"),
                *("--shutdown-timeout", "100"),
            ],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        deadline = time.monotonic() + 300  # a machine that is new to it compiles for minutes, on two busy cores
        while not is_up(f"http://127.0.0.1:{self.port}"):
            assert self.process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=600
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("serve") / "log")
    yield server
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)


def test_a_fact_far_back_is_retrieved_and_the_response_says_where_tokens_were(server):
    (question,) = questions(AutoTokenizer.from_pretrained(str(smollm2())), 2500, 1)
    reply = server.client.completions.create(model="m", prompt=question.prompt, max_tokens=28, temperature=0)
    assert question.number in reply.choices[0].text
    held = reply.model_extra["kv_transfer_params"]["retrieval"]
    assert held["prompt_tokens"] == len(question.prompt)
    assert held["paged_tokens"] + held["host_tokens"] >= len(question.prompt)
    assert held["host_tokens"] > 1500
    assert question.position < 128 + held["host_tokens"]
    assert held["path"] == "faiss"
    assert 64 < held["rows_read"] <= 1024 + 32
    assert held["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("program", "arguments", "says"),
    [
        (
            "ask_a_file.py",
            ("What is this about?", "Say it again."),
            r"> Say it again\.\n(.|\n)*tokens of prompt, first answer",
        ),
        ("openai_client.py", (), r"exactly: ([1-9]\d+)(\.\d+)? of \1(\.0)? host tokens read in a step"),
        ("langchain_chat.py", ("What is this about?", "--model", "m"), r"\w"),
    ],
)
def test_an_example_runs(program, arguments, says, server, tmp_path):
    text = tmp_path / "text"
    text.write_text("Attention sinks are the first tokens. The window is what came last. " * 80)
    command = [sys.executable, str(ROOT / "examples" / program), str(text), *arguments, "--max-tokens", "4"]
    command += ["--url", f"http://127.0.0.1:{server.port}/v1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(says, done.stdout), done.stdout


def family(server):
    return psutil.Process(server.process.pid).children(recursive=True)


def test_host_memory_is_private_and_has_no_name(server):
    modes = []
    for one in family(server):
        with contextlib.suppress(FileNotFoundError):  # processes and files come and go
            for link in Path(f"/proc/{one.pid}/fd").iterdir():
                if os.readlink(link).startswith("/memfd:vllm-retrieval-r0"):
                    modes.append(link.stat().st_mode & 0o777)
    assert set(modes) == {0o600}


def test_ray_listens_on_loopback_alone_and_wants_a_token(server):
    names = {}
    for one in family(server):
        with contextlib.suppress(psutil.NoSuchProcess):
            names[one.pid] = one.name()
    rays = {pid: name for pid, name in names.items() if name in ("gcs_server", "raylet") or name.startswith("ray::")}
    listening = [one for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.pid in rays]
    assert {rays[one.pid] for one in listening} >= {"gcs_server", "raylet"}
    assert all(one.laddr.ip.removeprefix("::ffff:") == "127.0.0.1" for one in listening)
    (gcs,) = (pid for pid, name in rays.items() if name == "gcs_server")
    (port,) = (one.laddr.port for one in listening if one.pid == gcs)
    code = f"from ray._raylet import GcsClient; GcsClient(address='127.0.0.1:{port}')"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert "InvalidAuthToken" in done.stderr


def test_streaming_gives_the_same_text(server):
    prompt = "Attention sinks are " * 60
    whole = server.client.completions.create(model="m", prompt=prompt, max_tokens=16, temperature=0).choices[0].text
    stream = server.client.completions.create(model="m", prompt=prompt, max_tokens=16, temperature=0, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole
    # As the README says; where this fails, vLLM has learned it.
    assert not any((chunk.model_extra or {}).get("kv_transfer_params") for chunk in chunks)


def test_a_prompt_beyond_host_memory_is_a_400_and_the_server_goes_on(server):
    ids = [100] * 8000  # 0.12 GB hold less
    with pytest.raises(openai.BadRequestError, match="raise host_memory_gb"):
        server.client.completions.create(model="m", prompt=[ids], max_tokens=4)
    assert server.client.completions.create(model="m", prompt="Hello", max_tokens=4).choices[0].text


def test_what_is_refused_is_counted_by_its_reason(server):
    before = scraped(server)
    refused = 'requests_refused_total,reason="arguments"'
    with pytest.raises(openai.BadRequestError, match="unknown request argument"):
        server.client.completions.create(
            model="m", prompt="Hello", max_tokens=2, extra_body={"vllm_xargs": {"retrieval_row": 5}}
        )
    after = scraped(server)
    assert after[refused] == before[refused] + 1
    for reason in ("host_memory", "draining"):
        name = f'requests_refused_total,reason="{reason}"'
        assert after[name] == before[name]


def scraped(server):
    """This backend's metrics: values by name and own labels."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=30).read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith("vllm:retrieval_"):
            name, _, rest = line.removeprefix("vllm:retrieval_").partition("{")
            labels, _, value = rest.rpartition("} ")
            own = [pair for pair in labels.split(",") if not pair.startswith(("engine=", "model_name="))]
            found[",".join([name, *own])] = float(value)
    return found


def scraped_until(server, condition, pause_s=0.3, ask=None):
    """Metrics once they fulfil a condition: they come with a step, and may take a moment."""
    deadline = time.monotonic() + 240
    while not condition(found := scraped(server)):
        assert time.monotonic() < deadline, found
        (ask or partial(server.client.completions.create, model="m", prompt="Hello", max_tokens=2))()
        time.sleep(pause_s)
    return found


def test_metrics_tell_what_happened_and_nothing_else(server):
    (question,) = questions(AutoTokenizer.from_pretrained(str(smollm2())), 2500, 1)
    before = scraped(server)
    reply = server.client.completions.create(model="m", prompt=question.prompt, max_tokens=20, temperature=0)
    held = reply.model_extra["kv_transfer_params"]["retrieval"]
    count = "request_host_tokens_count"
    after = scraped_until(server, lambda found: found[count] > before[count] and found["host_requests"] == 0)
    steps = 'steps_total,path="faiss"'
    decoded = reply.usage.completion_tokens - 1
    assert after[steps] - before[steps] == decoded
    rows = (after["rows_read_total"] - before["rows_read_total"]) / (30 * 3 * decoded)
    assert rows == pytest.approx(held["rows_read"], rel=0.05)  # which is told before the last step is over
    assert after["codes_scored_total"] - before["codes_scored_total"] > 30 * 3 * decoded * 1000
    histogram = "request_host_tokens_bucket", 'le="1024.0"', 'le="4096.0"'
    assert after[",".join(histogram[:2])] >= before[",".join(histogram[:2])]
    assert after[f"{histogram[0]},{histogram[2]}"] > before[f"{histogram[0]},{histogram[2]}"]
    assert after["healthy"] == after['workers,state="alive"'] == after['workers,state="wanted"'] == 1
    assert after['arena_bytes,kind="used"'] == after["arena_usage_ratio"] == after["host_tokens"] == 0
    assert 0.05e9 < after['arena_bytes,kind="capacity"'] < 0.12e9
    for name in ('steps_total,path="degraded"', 'steps_total,path="sketch"', 'worker_restarts_total,reason="died"'):
        assert after[name] == before[name] == 0
    assert after['requests_failed_total,reason="search"'] == after['layer_seconds_count,part="score"'] == 0
    searches = after["searches_total"] - before["searches_total"]
    assert searches == 30 * 3 * decoded
    assert after['layer_seconds_count,part="search"'] > before['layer_seconds_count,part="search"']
    assert after["paged_tokens"] == 0
    assert time.time() - after["sample_timestamp_seconds"] < 60
    (info,) = (name for name in after if name.startswith("config_info"))
    assert 'resident_tokens="1024"' in info


def test_a_dead_worker_shows_in_the_metrics(server):
    (worker,) = asked(server, "workers", "view")["0"]["each"]
    os.kill(worker["pid"], signal.SIGKILL)
    # A pause, since the engine's threads spin while it serves, and the new worker needs a core to start.
    died = 'worker_restarts_total,reason="died"'
    scraped_until(server, lambda found: found[died] >= 1 and found["healthy"] == 1, pause_s=3)


def test_every_metric_is_in_a_live_scrape(server):
    found = {name.partition(",")[0].partition("_total")[0] for name in scraped(server)}
    expected = {*names.GAUGES, *names.COUNTERS, *(f"{name}_bucket" for name in names.HISTOGRAMS), "config_info"}
    # No GPU here; reuse needs more host memory; and no step was compared.
    absent = {"sketch_bytes", "sketch_usage_ratio", "prefix_pages", "prefix_bytes", "recall", "mass", "output_error",
              "lse_bias"}  # fmt: skip
    assert expected - found <= absent


def test_status_is_what_the_metrics_say(server):
    status, found = asked(server, "status", "view"), scraped(server)
    (engine,) = status["engines"]
    assert (status["model"], status["draining"], status["running"]) == ("m", False, 0)
    assert engine["arena"]["capacity"] == found['arena_bytes,kind="capacity"']
    assert engine["steps"]["faiss"] == found['steps_total,path="faiss"'] > 0
    assert engine["rows_read"] == found["rows_read_total"]
    restarts = sum(value for name, value in found.items() if name.startswith("worker_restarts_total"))
    assert engine["workers"] == {"wanted": 1, "alive": 1, "restarts": restarts, "given_up": False}
    assert (engine["searches"], engine["host_tokens"]) == (found["searches_total"], found["host_tokens"])
    assert asked(server, "config", "view")["resident_tokens"] == 1024
    assert {"/retrieval/status", "/retrieval/drain"} <= set(asked(server, "/openapi.json")["paths"])


def asked(server, path, key=None, method="GET", body=None):
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"} if key else {}
    url = f"http://127.0.0.1:{server.port}{path if path.startswith('/') else f'/retrieval/{path}'}"
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


@contextlib.contextmanager
def a_long_answer(server, tokens=60):
    """One that is under way; yields a future of its finish reason and the tokens that it got."""

    def listen(stream):
        chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
        return chunks[-1].finish_reason, sum(bool(chunk.text) for chunk in chunks)

    stream = server.client.completions.create(
        model="m", prompt="Attention sinks are " * 60, max_tokens=tokens, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    first = next(iter(stream))
    assert first.choices
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(listen, stream)


def refused(server):
    """Seconds until a new request was refused with 503."""
    begin = time.monotonic()
    with pytest.raises(openai.InternalServerError, match="draining") as caught:
        server.client.completions.create(model="m", prompt="Hello", max_tokens=2)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"]
    return time.monotonic() - begin


def test_knobs_changed_while_it_serves_hold_for_requests_that_do_not_choose(server):
    (question,) = questions(AutoTokenizer.from_pretrained(str(smollm2())), 2500, 1)

    def rows(tokens=6, **more):
        reply = server.client.completions.create(
            model="m", prompt=question.prompt, max_tokens=tokens, temperature=0, extra_body={"vllm_xargs": more}
        )
        return reply.model_extra["kv_transfer_params"]["retrieval"]["rows_read"]

    told = asked(server, "config", "admin", "PATCH", {"rows": 100, "fidelity": 1.0})
    assert (told["old"]["rows"], told["new"]["rows"]) == (1024, 100)
    assert rows() <= 100 + 8
    assert rows(retrieval_rows=400) > 110
    assert asked(server, "config", "view")["rows"] == 100
    found = scraped_until(server, lambda found: found["compared_steps_total"] > 0, ask=lambda: rows(28))
    assert any(name.startswith("output_error") for name in found)
    asked(server, "config", "admin", "PATCH", {"rows": 1024, "fidelity": 0.002})
    assert asked(server, "fidelity", "view")["0"][0]["recall"] > 0
    assert rows() > 110


def test_a_worker_is_restarted_by_an_operator_and_answers_go_on(server):
    (before,) = asked(server, "workers", "view")["0"]["each"]
    restarts = 'worker_restarts_total,reason="asked"'
    assert scraped(server)[restarts] == 0
    assert asked(server, "workers/0/0/restart", "admin", "POST") == {"rank": 0, "number": 0}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        asked(server, "workers/0/7/restart", "admin", "POST")
    scraped_until(server, lambda found: found[restarts] == 1 and found["healthy"] == 1, pause_s=3)
    (after,) = asked(server, "workers", "view")["0"]["each"]
    assert (after["state"], after["pid"] != before["pid"]) == ("alive", True)


def test_a_request_is_listed_while_it_lives_and_ended_by_an_operator(server):
    with a_long_answer(server) as answer:
        deadline = time.monotonic() + 300
        while not (live := asked(server, "requests", "view")["live"]):
            assert time.monotonic() < deadline
        assert (live[0]["state"], live[0]["prompt_tokens"]) == ("running", 181)
        assert asked(server, f"requests/{live[0]['id']}/abort", "admin", "POST") == {"id": live[0]["id"]}
        finish, tokens = answer.result(300)
    assert (finish, tokens < 59) == ("abort", True)
    scraped_until(server, lambda found: not asked(server, "requests", "view")["live"])
    ended = [one for one in asked(server, "requests", "view")["ended"] if one["id"] == live[0]["id"]]
    assert [(one["state"], one["path"]) for one in ended] == [("abort", "paged")]


def test_events_tell_of_requests_that_ended(server):
    url = f"http://127.0.0.1:{server.port}/retrieval/events"
    request = urllib.request.Request(url, None, {"Authorization": "Bearer view"})
    with urllib.request.urlopen(request, timeout=300) as stream:
        assert stream.readline() == b"event: status\n"
        assert json.loads(stream.readline().removeprefix(b"data: "))["model"] == "m"
        server.client.completions.create(model="m", prompt="Hello", max_tokens=3)
        while stream.readline() != b"event: request\n":
            pass
        assert json.loads(stream.readline().removeprefix(b"data: "))["output_tokens"] == 3


def test_the_page_shows_what_the_status_says(server, tmp_path):
    folder = os.environ.get("RETRIEVAL_SCREENSHOTS")  # for the docs: pictures of a server that has something to do

    def ask():
        for number in range(4 if folder else 0):
            prompt = f"Tell me {number} things about attention. " * 250
            server.client.completions.create(
                model="m", prompt=prompt, max_tokens=90, temperature=0, extra_body={"ignore_eos": True}
            )

    page.check(f"http://127.0.0.1:{server.port}", Path(folder or tmp_path), ask)


def test_a_drained_server_finishes_what_runs_and_takes_nothing_new(server):
    with a_long_answer(server) as answer:
        assert asked(server, "drain", "admin", "POST") == {"draining": True, "running": 1}
        assert min(refused(server) for _ in range(3)) < 0.05
        with pytest.raises(urllib.error.HTTPError, match="503"):
            asked(server, "ready")
        finish, _ = answer.result(300)
    assert finish == "length"
    assert asked(server, "undrain", "admin", "POST") == {"draining": False, "running": 0}
    assert asked(server, "ready") == {"ready": True, "reason": None}
    assert server.client.completions.create(model="m", prompt="Hello", max_tokens=2).choices[0].text


def test_a_clean_end_leaves_no_process_and_cuts_no_answer(server):
    started = family(server)
    with a_long_answer(server) as answer:
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(urllib.error.HTTPError, match="503"):  # once the server has heard
            [asked(server, "ready") for _ in range(10_000)]
        assert min(refused(server) for _ in range(3)) < 0.05
        finish, _ = answer.result(300)
    assert finish == "length"
    server.process.wait(60)
    _, left = psutil.wait_procs(started, timeout=20)
    assert not left
