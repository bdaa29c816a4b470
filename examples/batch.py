# SPDX-License-Identifier: Apache-2.0
"""One question about many files, in Python without a server; answers as JSON."""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--question", required=True)
    parser.add_argument("--out", type=Path, help="default: the terminal")
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--retrieval", type=json.loads, default={}, help="knobs, such as '{\"host_memory_gb\": 64}'")
    arguments = parser.parse_args()

    from vllm import LLM, SamplingParams

    llm = LLM(
        arguments.model,
        attention_backend="retrieval",
        max_model_len=arguments.max_model_len,
        additional_config={"retrieval": arguments.retrieval},
    )
    chats = [[{"role": "user", "content": f"{path.read_text()}\n\n{arguments.question}"}] for path in arguments.files]
    sampling = SamplingParams(temperature=0, max_tokens=arguments.max_tokens)
    answers = [
        {
            "file": str(path),
            "answer": output.outputs[0].text.strip(),
            "retrieval": (output.kv_transfer_params or {}).get("retrieval"),
        }
        for path, output in zip(arguments.files, llm.chat(chats, sampling), strict=True)
    ]
    text = json.dumps(answers, indent=1, ensure_ascii=False)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
