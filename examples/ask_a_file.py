# SPDX-License-Identifier: Apache-2.0
"""Ask a server about a long file: a chat whose first message holds it. Answers are streamed as they come.

The file is computed once. Later questions begin with what is kept of it in host memory (prefix caching).
"""

import argparse
import time
from pathlib import Path

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=200)
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.url, api_key="none")
    model = client.models.list().data[0].id
    chat: list[dict[str, str]] = []
    for question in arguments.questions:
        said = question if chat else f"{arguments.file.read_text()}\n\n{question}"
        chat.append({"role": "user", "content": said})
        begin, first, answer = time.monotonic(), 0.0, ""
        stream = client.chat.completions.create(
            model=model,
            messages=chat,
            max_tokens=arguments.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        print(f"> {question}")
        for chunk in stream:
            for choice in chunk.choices:
                first = first or time.monotonic() - begin
                answer += choice.delta.content or ""
                print(choice.delta.content or "", end="", flush=True)
            if chunk.usage:
                print(f"\n[{chunk.usage.prompt_tokens} tokens of prompt, first answer after {first:.1f} s]\n")
        chat.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
