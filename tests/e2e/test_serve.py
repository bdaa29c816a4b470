"""`vllm serve` as a user starts it: spawned processes, HTTP, streaming, errors, shared memory after the end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import psutil
import pytest
from transformers import AutoTokenizer

from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.demo import free_port, is_up
from vllm_retrieval_attn.evaluation.needles import questions

SHM = Path("/dev/shm")


def ours():
    return set(SHM.glob("vllm-retrieval-*"))


class Server:
    def __init__(self, log: Path) -> None:
        self.port = free_port()
        self.log = log
        vllm = str(Path(sys.executable).parent / "vllm")
        knobs = '{"retrieval": {"host_memory_gb": 0.12, "resident_tokens": 1024}}'
        # The program must not see this test process's own setting.
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        self.process = subprocess.Popen(
            [
                *(vllm, "serve", str(smollm2()), "--attention-backend", "Retrieval", "--additional-config", knobs),
                *("--max-model-len", "8192", "--max-num-seqs", "4", "--enforce-eager", "--port", str(self.port)),
                *("--served-model-name", "m", "--host", "127.0.0.1", "--kv-cache-memory-bytes", "600000000"),
            ],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        deadline = time.monotonic() + 180
        while not is_up(f"http://127.0.0.1:{self.port}"):
            assert self.process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    # What a server that was killed with -9 leaves: its process is gone, its file is not.
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = SHM / f"vllm-retrieval-{dead.pid}-12345-r0"
    stale.write_bytes(b"x")
    server = Server(tmp_path_factory.mktemp("serve") / "log")
    family = [server.process.pid] + [child.pid for child in psutil.Process(server.process.pid).children(recursive=True)]
    server.files = {file for file in ours() if int(file.name.split("-")[2]) in family}  # other engines have theirs
    assert not stale.exists(), "the next start removes the file of a killed server"
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


def test_arena_file_is_private(server):
    assert server.files
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in server.files)


def test_streaming_gives_the_same_text(server):
    prompt = "Attention sinks are " * 60
    whole = server.client.completions.create(model="m", prompt=prompt, max_tokens=16, temperature=0).choices[0].text
    stream = server.client.completions.create(model="m", prompt=prompt, max_tokens=16, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole


def test_a_prompt_beyond_host_memory_is_a_400_and_the_server_goes_on(server):
    ids = [100] * 8000  # 0.12 GB hold less
    with pytest.raises(openai.BadRequestError, match="raise host_memory_gb"):
        server.client.completions.create(model="m", prompt=[ids], max_tokens=4)
    assert server.client.completions.create(model="m", prompt="Hello", max_tokens=4).choices[0].text


def test_a_clean_end_leaves_no_file(server):
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(40)
    deadline = time.monotonic() + 10
    while server.files & ours() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not server.files & ours()
