# SPDX-License-Identifier: Apache-2.0
"""A Llama model with one more KV head, and its query heads, so that two ranks can share the heads: of zeros, so that
answers stay what they are. `python tests/gpu/even_heads.py FOLDER OUT`."""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def even_heads(folder: Path, out: Path) -> None:
    """Write the model of ``folder``, a safetensors file with a config, to ``out``."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, group = config.get("head_dim") or config["hidden_size"] // heads, heads // kv_heads
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        more = (group if "q_proj" in name or "o_proj" in name else 1) * dim
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors[name] = torch.cat((tensor, tensor.new_zeros(more, tensor.shape[1])))
        elif name.endswith("o_proj.weight"):
            tensors[name] = torch.cat((tensor, tensor.new_zeros(tensor.shape[0], more)), 1)
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out / file.name)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    more = {"num_attention_heads": heads + group, "num_key_value_heads": kv_heads + 1, "head_dim": dim}
    (out / "config.json").write_text(json.dumps({**config, **more}))


if __name__ == "__main__":
    even_heads(Path(sys.argv[1]), Path(sys.argv[2]))
