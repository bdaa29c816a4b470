# SPDX-License-Identifier: Apache-2.0
"""The server behind LangChain's ChatOpenAI: ``pip install langchain-openai``."""

import argparse
from pathlib import Path

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=200)
    arguments = parser.parse_args()
    model = ChatOpenAI(
        base_url=arguments.url,
        api_key="none",
        model=arguments.model,
        temperature=0,
        max_completion_tokens=arguments.max_tokens,
        extra_body={"vllm_xargs": {"retrieval_rows": 2048}},
    )
    chain = ChatPromptTemplate.from_messages([("user", "{document}\n\n{question}")]) | model
    answer = chain.invoke({"document": arguments.file.read_text(), "question": arguments.question})
    print(answer.content)


if __name__ == "__main__":
    main()
