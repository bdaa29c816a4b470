# SPDX-License-Identifier: Apache-2.0
"""The tiny Llama with quantized weights: 4 bits as AWQ keeps them, or fp8 as vLLM makes it while loading."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.e2e.lora_engine import write_model
from tests.e2e.reuse_engine import apart
from vllm_retrieval_attn.bench.decode import _prompt
from vllm_retrieval_attn.bench.engine import InProcessEngine

# linear_kinds is sent to the worker, which is this process.
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
GROUP = 64
"""Input features that share a scale and a zero point."""
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs lies in which four bits of a word, from the lowest."""
GREEDY = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "detokenize": False, "logprobs": 2}


def packed(values: torch.Tensor) -> torch.Tensor:
    """Numbers below 16, int32 [rows, 8 n], as words [rows, n] in AWQ's order."""
    of_word = values.reshape(len(values), -1, 8)
    word = torch.zeros(of_word.shape[:2], dtype=torch.int64)
    for place, which in enumerate(ORDER):
        word |= of_word[:, :, which].to(torch.int64) << 4 * place
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A linear layer's weight [out, in], rounded to 4 bits by groups of inputs."""
    grouped = weight.T.reshape(-1, GROUP, weight.shape[0])  # [groups, group, out]
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    scale = (high - low) / 15
    zero = torch.round(-low / scale)
    values = torch.clamp(torch.round(grouped / scale[:, None]) + zero[:, None], 0, 15)
    words = packed(values.reshape(-1, weight.shape[0]).to(torch.int32))
    return {"qweight": words, "qzeros": packed(zero.to(torch.int32)), "scales": scale.half()}


def write(folder: Path, weights: str) -> dict[str, Any]:
    """The model in ``folder``, and the engine options that go with it."""
    write_model(folder)
    if weights != "awq":
        return {"dtype": "bfloat16", **({"quantization": "fp8"} if weights == "fp8" else {})}
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj." in name:
            tensors.update({name.replace("weight", part): made for part, made in awq(tensor).items()})
        else:
            tensors[name] = tensor.half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    return {"dtype": "float16"}


def answers(folder: Path, backend: str, knobs: dict[str, Any] | None, **how: Any) -> tuple[list[Any], set[str]]:
    """Greedy answers to two prompts, and the kinds of the model's linear layers."""
    engine = InProcessEngine(
        str(folder), knobs, backend, skip_tokenizer_init=True, max_model_len=8192, max_num_seqs=4, seed=0,
        max_num_batched_tokens=2048, kv_cache_memory_bytes=200_000_000, enable_prefix_caching=False, **how,
    )  # fmt: skip
    found = engine.run([_prompt(length, 1000, length) for length in (1500, 5200)], **GREEDY)
    kinds = engine.llm.apply_model(linear_kinds)[0]
    engine.close()
    return found, kinds


def linear_kinds(model: torch.nn.Module) -> set[str]:
    """Names of the classes that multiply by the layers' weights."""
    linear = [part for part in model.modules() if "_proj" in getattr(part, "prefix", "")]
    return {type(part.quant_method).__name__ for part in linear if hasattr(part, "quant_method")}


def main() -> None:
    """AWQ on the CPU; vLLM's CPU build has no fp8 weights."""
    out = Path(sys.argv[1])
    folder = out.with_suffix("")
    write(folder, "awq")
    how: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": True}
    full, kinds = answers(folder, "CPU_ATTN", None, **how)
    ours, _ = answers(folder, "retrieval", {"host_memory_gb": 0.2, "index": "flat", "resident_tokens": 1024}, **how)
    told = {
        "kinds": sorted(kinds),
        "apart": [apart(mine, its) for mine, its in zip(ours, full, strict=True)],
        "host": [one.retrieval["host_tokens"] for one in ours],
        "words": len(set(full[1].tokens)),
    }
    out.write_text(json.dumps(told))
    os._exit(0)


if __name__ == "__main__":
    main()
