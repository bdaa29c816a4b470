# SPDX-License-Identifier: Apache-2.0
"""`make demo`: serve SmolLM2-135M with the retrieval backend and ask about facts far back in a long document.

Starts ``vllm serve`` as a user would, waits for it, asks through the OpenAI client, shows answers and where the
tokens were, and ends the server. `make serve` (``--serve``) starts the same server and leaves it to the user.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer

from vllm_retrieval_attn.bench.http import free_port, is_up
from vllm_retrieval_attn.bench.models import smollm2
from vllm_retrieval_attn.evaluation.needles import questions

DOCUMENTS = ((3_000, 2), (4_000, 5))
"""Prompt tokens and seed of each document. One fact each: a model of 135M parameters confuses several."""
KEYS = ("VIEW", "ADMIN")
_START_S, _ANSWER_S = 40, 8
"""Usual durations on two cores, for the progress bar."""


def wait(progress: Progress, what: str, usual_s: float, done: Any) -> None:
    """Show a bar against the usual duration until ``done()``."""
    task = progress.add_task(what, total=usual_s)
    begin = time.monotonic()
    while not done():
        progress.update(task, completed=min(time.monotonic() - begin, usual_s * 0.98))
        time.sleep(0.2)
    progress.update(task, completed=usual_s)


_KNOBS = {"host_memory_gb": 2, "resident_tokens": 1024, "answer_timeout_s": 60}
"""On a busy laptop the first search may take seconds: the demo had better wait for it than read all rows."""


def serve_command(model: str, port: int) -> list[str]:
    """What a user would type, with the program's full path."""
    return [
        *(str(Path(sys.executable).parent / "vllm"), "serve", model, "--attention-backend", "retrieval"),
        *("--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "8192", "--max-num-seqs", "4", "--enforce-eager"),
        *("--additional-config", json.dumps({"retrieval": _KNOBS})),
    ]


def prepare() -> None:
    """What a first start would wait for: the model's files, the CPU workers' compiled kernels, and what vLLM wants to
    know of the model's class."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_retrieval_attn.bench.search import measure

    measure((2, 2, 64), 4096, 1, [64], {})
    EngineArgs(model=str(smollm2())).create_engine_config()


def main(out: Path | None = None) -> None:
    """Serve, ask, show, end. out: for the rows as JSON."""
    console = Console()
    console.print("SmolLM2-135M reads two long documents, one fact in each. About a minute.")
    model = str(smollm2())
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = serve_command(model, port)
    console.print("$ vllm " + " ".join(command[1:]), style="dim")
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
    if out:
        out.write_text(json.dumps(rows))
    if not all(row["right"] for row in rows):
        raise SystemExit("an answer is wrong: look whether --attention-backend CPU_ATTN gives it too")


def serve(port: int) -> None:
    """The demo's server in the foreground, with its page. Does not return."""
    keys = {
        f"RETRIEVAL_{kind}_KEY": os.environ.get(f"RETRIEVAL_{kind}_KEY") or secrets.token_urlsafe(9) for kind in KEYS
    }
    print(f"The OpenAI API:  http://127.0.0.1:{port}/v1   (model: smollm2)")
    print(f"The page:        http://127.0.0.1:{port}/retrieval/")
    print(f"  key to view it:    {keys['RETRIEVAL_VIEW_KEY']}")
    print(f"  key to change:     {keys['RETRIEVAL_ADMIN_KEY']}")
    print("It is up when vLLM says 'Application startup complete.'; Ctrl-C ends it.", flush=True)
    command = serve_command(str(smollm2()), port)
    os.execve(command[0], command, {**os.environ, **keys, "VLLM_PLUGINS": "retrieval"})


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
                    "key": question.key,
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
    """The result in a line, then a row for each question; at most 80 columns."""
    right = sum(row["right"] for row in rows)
    paged, all_tokens = (
        round(sum(row[name] for row in rows) / len(rows)) for name in ("paged_tokens", "prompt_tokens")
    )
    console.print(
        f"[bold]{right} of {len(rows)} facts found[/bold], with {paged:,} of {all_tokens:,} tokens in paged memory.",
        highlight=False,
    )
    table = Table(
        caption="Pages held only the first and the latest tokens; the facts were retrieved from the host.",
        box=box.SIMPLE_HEAD,
        padding=(0, 0),
        width=80,
    )
    for name in ("fact", "number", "found"):
        table.add_column(name, no_wrap=True)
    for name in ("at token", "of", "in pages", "on host", "rows read", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["key"],
            row["expected"],
            "yes" if row["right"] else "no",
            str(row["position"]),
            *(str(row[name]) for name in ("prompt_tokens", "paged_tokens", "host_tokens")),
            f"{row['rows_read']:.0f}",
            f"{row['seconds']:.0f} s",
        )
    console.print(table)
    for row in rows:
        if not row["right"]:
            console.print(f"{row['key']}: expected {row['expected']}, was told: {row['answer']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="serve the demo's model, with the page, until Ctrl-C")
    parser.add_argument("--prepare", action="store_true", help="unpack and compile what a start needs, and end")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--json", type=Path, help="write what was found there")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.port)
    elif arguments.prepare:
        prepare()
    else:
        main(arguments.json)
