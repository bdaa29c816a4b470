# SPDX-License-Identifier: Apache-2.0
"""What a request may set and what a response tells, with the OpenAI client.

``vllm_xargs`` is vLLM's place for what backends understand; ``kv_transfer_params`` is where it puts what they tell.
"""

import argparse
from pathlib import Path
from typing import Any

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a text that is continued")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=20)
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.url, api_key="none")
    model = client.models.list().data[0].id
    wishes: dict[str, dict[str, Any]] = {
        "the server's default": {},
        "fewer rows": {"retrieval_rows": 128},
        "more rows": {"retrieval_rows": 2048, "retrieval_tau": 0.0005},
        "exactly": {"retrieval_exact": True},
    }
    for name, wish in wishes.items():
        reply = client.completions.create(
            model=model,
            prompt=arguments.file.read_text(),
            max_tokens=arguments.max_tokens,
            temperature=0,
            extra_body={"vllm_xargs": wish} if wish else None,
        )
        told = (reply.model_extra or {})["kv_transfer_params"]["retrieval"]
        print(f"{name}: {told['rows_read']} of {told['host_tokens']} host tokens read in a step, path {told['path']}")
        print(f"  {reply.choices[0].text.strip()!r}")


if __name__ == "__main__":
    main()
