# SPDX-License-Identifier: Apache-2.0
"""What a model is known by: its learned space belongs to it, wherever it lies."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_HEAD_BYTES = 1 << 16
_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def model_identity(vllm_config: "VllmConfig") -> str:
    """A hash of the model's config and weights: of files in a folder their sizes and beginnings, else name and
    revision. Dummy weights are told apart by the seed."""
    model = vllm_config.model_config
    config = {name: value for name, value in model.hf_config.to_dict().items() if name not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    folder = Path(model.model)
    if vllm_config.load_config.load_format == "dummy":
        digest.update(f"dummy {model.seed}".encode())
    elif folder.is_dir():
        weights = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".gguf"))
        for path in weights:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_HEAD_BYTES))
                file.seek(max(0, path.stat().st_size - _HEAD_BYTES))
                digest.update(file.read(_HEAD_BYTES))
    else:
        digest.update(f"{model.model} {model.revision}".encode())
    return digest.hexdigest()[:24]
