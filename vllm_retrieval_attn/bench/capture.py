# SPDX-License-Identifier: Apache-2.0
"""Real queries, keys and values of a Hugging Face causal LM, kept in a file to study and test indexes with.

`python -m vllm_retrieval_attn.bench.capture --model FOLDER --tokens 16000 --out capture.npz`

The prompt is a text with planted facts (evaluation/planting.py). Decode queries come from answering questions about the
facts and from reading on in the text. bench/capture_file.py says what the file holds.
"""

import argparse
import copy
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_retrieval_attn.bench.capture_file import Head, save
from vllm_retrieval_attn.bench.recorder import Recorder, choose_layers, half
from vllm_retrieval_attn.evaluation.planting import Tokens, plant

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""

_INTERFACE = "retrieval_capture"  # our name among transformers' attention functions


@torch.inference_mode()
def capture_tokens(
    model: Any,
    tokens: Tokens,
    tag: str,
    *,
    layers: list[int],
    heads: list[tuple[int, int]] | None = None,
    sink: int = 128,
    window: int = 512,
    prompt_queries: int = 1024,
    answer_tokens: int = 10,
    chunk: int = 2048,
    progress: Progress | None = None,
) -> tuple[list[Head], list[list[int]]]:
    """Capture from a loaded model; see ``capture``.

    Args:
        model: a causal LM of transformers; its attention function is replaced during the call.
        heads: (layer, KV head) pairs to keep; None for all heads of ``layers``.
        chunk: prompt tokens in one forward pass.

    Returns:
        The heads, and the answer to each question: ``answer_tokens`` greedy token ids.
    """
    from transformers import AttentionInterface, DynamicCache

    length = len(tokens.prompt)
    bound = length - window
    if bound <= sink:
        raise ValueError(f"{length} tokens leave none to index after a sink of {sink} and a window of {window}")
    recent = min(prompt_queries, length)
    strided = np.unique(np.linspace(0, length - recent - 1, min(prompt_queries, length - recent)).astype(np.int64))
    cache = DynamicCache(config=model.config)
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    positions = np.concatenate([strided, np.arange(length - recent, length)])
    recorder = Recorder(layers, windows, positions, sink, bound)

    def forward(ids: list[int], start: int) -> torch.Tensor:
        """Run tokens from position ``start``; the last one's logits, (vocabulary,)."""
        where = torch.arange(start, start + len(ids), device=model.device)[None]
        given = torch.tensor([ids], device=model.device)
        result = model(
            input_ids=given, position_ids=where, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[0, -1]
        assert isinstance(result, torch.Tensor)
        return result

    def report(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)

    before = model.config._attn_implementation
    AttentionInterface.register(_INTERFACE, recorder)
    model.set_attn_implementation(_INTERFACE)
    try:
        for first in range(0, length, chunk):
            forward(tokens.prompt[first : first + chunk], first)
            report("prompt", min(first + chunk, length), length)
        # Cache layers grow by concatenation to new tensors, so shallow copies keep the prompt's state; crop() can
        # not bring back what a sliding-window layer dropped.
        state: Any = cache.layers
        recorder.decoding = True
        decode_positions, answers = [], []
        for number, question in enumerate(tokens.questions):
            cache.layers = [copy.copy(layer) for layer in state]
            fed, answer, at = question, [], length
            for _ in range(answer_tokens):
                logits = forward(fed, at)
                at += len(fed)
                decode_positions.append(at - 1)
                answer.append(int(logits.argmax()))
                fed = answer[-1:]
            answers.append(answer)
            report("questions", number + 1, len(tokens.questions))
        cache.layers = [copy.copy(layer) for layer in state]
        for number, token in enumerate(tokens.continuation):
            forward([token], length + number)
            decode_positions.append(length + number)
            report("continuation", number + 1, len(tokens.continuation))
    finally:
        model.set_attn_implementation(before)

    kept = []
    for layer in layers:
        if not recorder.decode[layer]:
            raise ValueError(f"layer {layer} does not call transformers' attention interface, or nothing was decoded")
        keys, values = (
            half(tensor[0], f"keys or values of layer {layer}").numpy()
            for tensor in (state[layer].keys, state[layer].values)
        )
        kv_heads = len(keys)
        prompt = torch.cat(recorder.prompt[layer], 1).unflatten(0, (kv_heads, -1)).numpy()
        q, osw, lsw = (torch.stack(parts, 2).numpy() for parts in zip(*recorder.decode[layer], strict=True))
        for head in range(kv_heads):
            if heads is None or (layer, head) in heads:
                kept.append(
                    Head(
                        f"{tag}_L{layer}_h{head}",
                        K=keys[head],
                        V=values[head],
                        Qprompt=prompt[head][:, len(strided) :],
                        Qprompt_strided=prompt[head][:, : len(strided)],
                        q=q[head],
                        pos=np.array(decode_positions, np.int64),
                        osw=osw[head],
                        lsw=lsw[head],
                        sink=sink,
                        bound=bound,
                        scale=recorder.scale[layer],
                    )
                )
    return kept, answers


def _load_model(model: str) -> tuple[Any, Any]:
    """Model and tokenizer; on the GPU if there is one, in the dtype of the weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def capture(
    model: str,
    text: str | None,
    out: Path,
    *,
    tokens: int,
    layers: list[int] | None = None,
    heads: list[tuple[int, int]] | None = None,
    sink: int = 128,
    window: int = 512,
    prompt_queries: int = 1024,
    decode: int = 48,
    questions: int = 8,
    answer_tokens: int = 10,
    seed: int = 0,
    chunk: int = 2048,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Capture attention inputs of ``model`` over a long text, and write them to ``out``.

    Args:
        model: Hugging Face folder or name.
        text: what the model reads, from its begin; None for docstrings of Python's standard library.
        tokens: prompt length P.
        layers: layers to capture; None for those of ``heads``, or up to four global layers spread evenly.
        heads: (layer, KV head) pairs to keep; None for all.
        sink, window: tokens at the prompt's begin and end that are not indexed.
        prompt_queries: how many of the last prompt queries to keep, and as many earlier ones.
        decode: decode queries from reading on in the text, each the text's own next token.
        questions: facts planted in the indexed part, each asked for: ``answer_tokens`` greedy decode queries.
        seed: places and wording of the facts.
        chunk: prompt tokens in one forward pass.

    Returns:
        What was written, for a person: file, heads, sizes, times in seconds, and each question's answer.

    Raises:
        ValueError: text too short, prompt too long for the model, a layer or head that can not be captured.
    """
    begin = time.perf_counter()
    if questions * answer_tokens + decode == 0:
        raise ValueError("without questions and without decode steps there is no decode query to capture")
    from transformers import AutoConfig

    try:
        chosen = choose_layers(AutoConfig.from_pretrained(model), layers, heads)
        loaded, tokenizer = _load_model(model)
    except OSError as error:
        raise ValueError(f"can not load {model!r}: {str(error).splitlines()[0]}") from None
    fed, facts = plant(tokenizer, text, tokens, sink, window, decode, questions, seed)
    most = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = tokens + max([decode, *(len(question) + answer_tokens for question in fed.questions)])
    if most is not None and longest > most:
        raise ValueError(f"{tokens} tokens and what follows, {longest} in all, exceed the model's {most} positions")
    tag = re.sub(r"[^A-Za-z0-9.]+", "-", Path(model).name)
    ready = time.perf_counter()
    kept, answers = capture_tokens(
        loaded,
        fed,
        tag,
        layers=chosen,
        heads=heads,
        sink=sink,
        window=window,
        prompt_queries=prompt_queries,
        answer_tokens=answer_tokens,
        chunk=chunk,
        progress=progress,
    )
    run = time.perf_counter()
    save(out, kept)
    replies = []
    for (key, number, position), answer in zip(facts, answers, strict=True):
        reply = tokenizer.decode(answer)
        replies.append(
            {"key": key, "expected": number, "position": position, "answer": reply, "right": number in reply}
        )
    return {
        "file": str(out),
        "bytes": out.stat().st_size,
        "heads": [head.name for head in kept],
        "tokens": tokens,
        "indexed": tokens - window - sink,
        "decode_queries": len(kept[0].pos),
        "right": sum(bool(reply["right"]) for reply in replies),
        "questions": replies,
        "seconds": {
            "load": round(ready - begin, 1),
            "run": round(run - ready, 1),
            "write": round(time.perf_counter() - run, 1),
        },
    }


def layer_list(argument: str) -> list[int]:
    """6,15"""
    return [int(part) for part in argument.split(",")]


def head_list(argument: str) -> list[tuple[int, int]]:
    """6:0,15:2"""
    pairs = [part.split(":") for part in argument.split(",")]
    return [(int(layer), int(head)) for layer, head in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="text file to read; by default docstrings of the standard library")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--layers", type=layer_list, help="such as 6,15; by default up to four")
    parser.add_argument(
        "--heads", type=head_list, help="layer:head pairs to keep, such as 6:0,15:2; by default all of the layers"
    )
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--prompt-queries", type=int, default=1024)
    parser.add_argument("--decode", type=int, default=48)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=2048)
    args = parser.parse_args()
    begin = said = time.perf_counter()

    def say(stage: str, done: int, total: int) -> None:
        nonlocal said
        now = time.perf_counter()
        if done == total or now - said > 10:
            said = now
            print(f"{now - begin:7.1f} s  {stage} {done} of {total}", flush=True)

    try:
        summary = capture(
            args.model,
            args.text.read_text() if args.text else None,
            args.out,
            tokens=args.tokens,
            layers=args.layers,
            heads=args.heads,
            sink=args.sink,
            window=args.window,
            prompt_queries=args.prompt_queries,
            decode=args.decode,
            questions=args.questions,
            seed=args.seed,
            chunk=args.chunk,
            progress=say,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"capture: {error}") from None
    for reply in summary["questions"]:
        print(f"{reply['expected']} {reply['right']} {reply['answer']!r}")
    print(f"{summary['right']} of {len(summary['questions'])} right")
    print(f"{args.out}: {len(summary['heads'])} heads, {summary['bytes'] / 1e6:.1f} MB, seconds {summary['seconds']}")


if __name__ == "__main__":
    main()
