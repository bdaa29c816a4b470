"""Real queries, keys and values of a Hugging Face causal LM, kept in a file to study and test indexes with.

`python -m vllm_retrieval_attn.bench.capture --model FOLDER --tokens 16000 --out capture.npz`

The prompt is a text with planted facts (see needles.py). Decode queries come from answering questions about the facts
and from reading on in the text. bench/capture_file.py says what the file holds.
"""

import argparse
import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_retrieval_attn.attention.merge import merge_partials
from vllm_retrieval_attn.bench import needles
from vllm_retrieval_attn.bench.capture_file import Head, save

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""

_INTERFACE = "retrieval_capture"  # our name among transformers' attention functions
_ROOM = 64  # tokens of text for each planted fact, so that facts (about 25 tokens) do not touch
_BLOCK = 1024  # queries that share one mask in a sliding-window layer


def _dense(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention with log-sum-exp by PyTorch's kernels.

    Args:
        query: (1, h, n, d). keys, values: (1, kv_heads, m, d). causal: query i sees keys up to i (n == m).

    Returns:
        (1, h, n, d) in the dtype of the query and (1, h, n) float32 natural log-sum-exp.
    """
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, causal, scale=scale
        )
        return out, lse
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    if query.dtype == torch.float32 or query.shape[-1] > 256:  # more than FlashAttention takes
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, values, None, True, 0.0, causal, scale=scale
        )
        return out, lse[..., : query.shape[2]]  # the kernel pads it to a multiple of 32
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, causal, scale=scale)
    return out, lse


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention of a sequence's last n tokens.

    Args:
        query: (1, h, n, d). keys, values: (1, kv_heads, m, d), the last m tokens, m >= n. window: tokens that a
            query sees, itself included; None for all.

    Returns:
        (1, h, n, d) in the dtype of the query.
    """
    n, m = query.shape[2], keys.shape[2]
    if window is not None and m > window:
        blocks = []
        for first in range(0, n, _BLOCK):
            last = min(first + _BLOCK, n)
            low, high = max(0, m - n + first - window + 1), m - n + last
            at = torch.arange(m - n + first, high, device=query.device)[:, None]
            of = torch.arange(low, high, device=query.device)
            blocks.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query[:, :, first:last],
                    keys[:, :, low:high],
                    values[:, :, low:high],
                    attn_mask=(of <= at) & (of > at - window),
                    scale=scale,
                    enable_gqa=True,
                )
            )
        return torch.cat(blocks, 2)
    if n == 1 or n == m:
        return _dense(query, keys, values, scale, causal=n > 1)[0]
    # The chunk itself is causal; everything before it is seen by all of its queries.
    out, lse = _dense(query, keys[:, :, m - n :], values[:, :, m - n :], scale, causal=True)
    earlier, earlier_lse = _dense(query, keys[:, :, : m - n], values[:, :, : m - n], scale, causal=False)
    merged, _ = merge_partials(out.float(), lse.float(), earlier.float(), earlier_lse.float())
    return merged.to(query.dtype)


def _half(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """float16 on the CPU."""
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{what} do not fit float16")
    return half.cpu()


class _Recorder:
    """The model's attention function: exact attention that keeps the queries of some layers.

    ``decoding`` says which: of each call the last token's (with attention to what is not indexed), or else those of
    ``prompt_positions``.
    """

    def __init__(
        self,
        layers: list[int],
        windows: list[int | None],
        prompt_positions: npt.NDArray[np.int64],
        sink: int,
        bound: int,
    ) -> None:
        self.decoding = False
        self.scale: dict[int, float] = {}
        self.prompt: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}  # (h, some, d) float16
        # q (kv_heads, g, d), osw (kv_heads, g, d) and lsw (kv_heads, g) of each decode query
        self.decode: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {layer: [] for layer in layers}
        self._windows = windows
        self._prompt_positions = prompt_positions
        self._sink = sink
        self._bound = bound

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """(1, n, h, d) from query (1, h, n, d) and the cache's key and value (1, kv_heads, m, d)."""
        for option in ("softcap", "s_aux", "position_bias"):
            if options.get(option) is not None:
                raise ValueError(f"the model's attention is no plain softmax: it uses {option}")
        # torch types every attribute of a module as a tensor or a module.
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if layer in self.prompt:
            self.scale[layer] = scale
            if self.decoding:
                self._keep_decode(layer, query[0, :, -1], key[0], value[0])
            else:
                begin, end = key.shape[2] - query.shape[2], key.shape[2]
                wanted = self._prompt_positions[(self._prompt_positions >= begin) & (self._prompt_positions < end)]
                rows = query[0, :, torch.from_numpy(wanted - begin).to(query.device)]
                self.prompt[layer].append(_half(rows, f"queries of layer {layer}"))
        return attend(query, key, value, scale, self._windows[layer]).transpose(1, 2).contiguous(), None

    def _keep_decode(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        # Computed from the rounded values, as a reader of the file would.
        q = _half(query, f"queries of layer {layer}").unflatten(0, (key.shape[0], -1))
        keys, values = (
            _half(torch.cat([t[:, : self._sink], t[:, self._bound :]], 1), f"keys or values of layer {layer}").float()
            for t in (key, value)
        )
        scores = self.scale[layer] * (q.float() @ keys.transpose(1, 2))
        out = torch.softmax(scores, -1) @ values
        self.decode[layer].append((q, out.to(torch.float16), torch.logsumexp(scores, -1)))


def global_layers(config: Any) -> list[int]:
    """Numbers of the layers with attention to all earlier tokens.

    Raises:
        ValueError: the model has layers of a kind that can not be run here.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=config).layers
    for number, layer in enumerate(layers):
        types = getattr(config.get_text_config(decoder=True), "layer_types", None)
        kind = types[number] if types else "full_attention"
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or kind == "chunked_attention":
            raise ValueError(f"layer {number} is of type {kind}: only full and sliding-window attention are supported")
    return [number for number, layer in enumerate(layers) if type(layer) is DynamicLayer]


def choose_layers(config: Any, layers: list[int] | None, heads: list[tuple[int, int]] | None = None) -> list[int]:
    """The layers asked for and those of ``heads``, or else up to four global ones spread evenly.

    Raises:
        ValueError: a layer or head asked for is not there, or the layer is not global.
    """
    there = global_layers(config)
    if heads is not None:
        decoder = config.get_text_config(decoder=True)
        count = getattr(decoder, "num_key_value_heads", None) or decoder.num_attention_heads
        if beyond := [head for _, head in heads if not 0 <= head < count]:
            raise ValueError(f"KV head {beyond[0]} is not there; the model has {count} in a layer")
        layers = [layer for layer, _ in heads] + (layers or [])
    if layers is None:
        count = min(4, len(there))
        return [there[(2 * i + 1) * len(there) // (2 * count)] for i in range(count)]
    if strangers := sorted(set(layers) - set(there)):
        raise ValueError(f"layer {strangers[0]} is not a global attention layer; these are: {there}")
    return sorted(set(layers))


@dataclass
class Tokens:
    """What a capture feeds the model."""

    prompt: list[int]
    questions: list[list[int]]
    """Each is asked right after the prompt, the others forgotten."""
    continuation: list[int]
    """Read after the prompt, the questions forgotten."""


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
    recorder = _Recorder(layers, windows, positions, sink, bound)

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
            _half(tensor[0], f"keys or values of layer {layer}").numpy()
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


def plant(
    tokenizer: Any, text: str | None, length: int, sink: int, window: int, decode: int, count: int, seed: int
) -> tuple[Tokens, list[tuple[str, str, int]]]:
    """The prompt of ``length`` tokens with ``count`` facts in its indexed part, questions, and the text that follows.

    Returns:
        The tokens, and (key, number, position) of each fact.
    """
    start = tokenizer.encode("")  # what the model expects first, such as <bos>
    planted = length - window - len(start)
    if planted - sink < _ROOM * max(count, 1):
        needed = window + len(start) + sink + _ROOM * max(count, 1)
        raise ValueError(f"{length} tokens are too few for {count} questions; at least {needed} are needed")
    document, facts = needles.planted_document(tokenizer, planted, count, seed, text, tail=window + decode)
    document = start + document
    # The answer's first words are given, for models that would not go on with the number at once.
    asked = [
        needles.question(tokenizer, key)
        + tokenizer.encode(f" The special magic number for {key} is:", add_special_tokens=False)
        for key, _, _ in facts
    ]
    where = [(key, number, position + len(start)) for key, number, position in facts]
    return Tokens(document[:length], asked, document[length:]), where


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
