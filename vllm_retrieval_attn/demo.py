"""`make demo`: serve SmolLM2-135M with the retrieval backend and ask about facts far back in a long document.

Starts ``vllm serve`` as a user would, waits for it, asks through the OpenAI client, shows answers and where the
tokens were, and ends the server.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer

from vllm_retrieval_attn.bench.http import free_port, is_up
from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.evaluation.needles import questions

DOCUMENTS = ((3_000, 2), (3_000, 4), (4_000, 5))
"""Prompt tokens and seed of each document. One fact each: a model of 135M parameters confuses several."""
_START_S, _ANSWER_S = 60, 25
"""Usual durations on two cores, for the progress bar."""


def wait(progress: Progress, what: str, usual_s: float, done: Any) -> None:
    """Show a bar against the usual duration until ``done()``."""
    task = progress.add_task(what, total=usual_s)
    begin = time.monotonic()
    while not done():
        progress.update(task, completed=min(time.monotonic() - begin, usual_s * 0.98))
        time.sleep(0.2)
    progress.update(task, completed=usual_s)


def main() -> None:
    console = Console()
    model = str(smollm2())
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(str(Path(sys.executable).parent / "vllm"), "serve", model, "--attention-backend", "retrieval"),
        *("--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "8192", "--max-num-seqs", "4", "--enforce-eager"),
        *("--additional-config", '{"retrieval": {"host_memory_gb": 2, "resident_tokens": 1024}}'),
    ]
    console.print(f"[bold]$ {' '.join(command[1:])}[/bold]")
    log = Path(tempfile.gettempdir()) / f"retrieval-demo-{os.getpid()}.log"
    bars = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    )
    with log.open("w") as sink, bars as progress:
        server = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        try:
            wait(progress, "starting the server", _START_S, lambda: server.poll() is not None or is_up(url))
            if server.poll() is not None:
                raise SystemExit(f"the server did not start; its log is {log}\n" + log.read_text()[-3000:])
            rows = ask_all(progress, url, model)
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
    show(console, rows)
    log.unlink()
    if not all(row["right"] for row in rows):
        raise SystemExit("an answer is wrong: look whether --attention-backend CPU_ATTN gives it too")


def ask_all(progress: Progress, url: str, model: str) -> list[dict[str, Any]]:
    """Ask for the fact in each document; one row each."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [question for length, seed in DOCUMENTS for question in questions(tokenizer, length, 1, seed)]
    rows = []
    with ThreadPoolExecutor(1) as pool:
        for question in asked:
            begin = time.monotonic()
            future: Future[Any] = pool.submit(
                client.completions.create, model="smollm2", prompt=question.prompt, max_tokens=28, temperature=0
            )
            wait(progress, f"what is the number for {question.key}?", _ANSWER_S, future.done)
            reply = future.result()
            held = (reply.model_extra or {})["kv_transfer_params"]["retrieval"]
            answer = reply.choices[0].text.strip().partition("\n")[0]  # the model goes on with the document
            rows.append(
                {
                    "question": question.key,
                    "position": question.position,
                    "expected": question.number,
                    "answer": answer,
                    "right": question.number in answer,
                    "seconds": time.monotonic() - begin,
                    **held,
                }
            )
    return rows


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="Only sinks and a recent window stay in paged memory; the fact is retrieved from the host")
    table.add_column("answer", min_width=30)
    table.add_column("right")
    for name in ("fact at", "prompt tokens", "tokens in pages", "tokens on host", "host rows read", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["answer"],
            "yes" if row["right"] else f"no, {row['expected']}",
            str(row["position"]),
            *(str(row[name]) for name in ("prompt_tokens", "paged_tokens", "host_tokens", "rows_read")),
            f"{row['seconds']:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
