# SPDX-License-Identifier: Apache-2.0
"""What this package takes from vLLM, read from its sources: imports, overridden methods, wrapped methods.

``MEMBERS`` adds what no reader of sources finds: members of vLLM's objects that the package reads, most private.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import vllm_retrieval_attn

PYTHONS = {"sys"}
"""What is wrapped and not vLLM's."""
PACKAGE = Path(vllm_retrieval_attn.__file__).parent

MEMBERS = {
    "vllm.config:VllmConfig": ["kv_transfer_config", "additional_config", "attention_config", "use_v2_model_runner"],
    "vllm.v1.core.sched.scheduler:Scheduler": [
        "_free_request_blocks", "encoder_cache_manager", "reset_preempted_req_ids", "requests", "connector",
    ],
    "vllm.v1.engine.output_processor:OutputProcessor": ["request_states"],
    "vllm.v1.engine.output_processor:RequestState": ["streaming_input", "queue"],
    "vllm.v1.engine.utils:CoreEngineProcManager": ["_request_shutdown_timeout", "processes"],
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry": ["_ensure_registered", "register"],
    "vllm.v1.outputs:KVConnectorOutput": ["failed_recving", "kv_connector_worker_meta"],
    "vllm.v1.request:Request": [
        "block_hashes", "num_computed_tokens", "num_tokens", "num_preemptions", "num_prompt_tokens",
        "skip_reading_prefix_cache",
    ],
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager": ["_capture_descs", "graphs", "vllm_config"],
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ["input_batch"],
}  # fmt: skip


@dataclass
class Uses:
    """Symbols by ``module:name``; ``overrides`` by our class: its bases from vLLM and its methods."""

    symbols: set[str] = field(default_factory=set)
    members: set[tuple[str, str]] = field(default_factory=set)
    overrides: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)


def uses() -> Uses:
    """All that the package takes from vLLM."""
    found = Uses(set(MEMBERS), {(owner, name) for owner, names in MEMBERS.items() for name in names})
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        names = dict(_imported(tree))
        found.symbols |= set(names.values())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases = [names[base] for base in map(_base_name, node.bases) if base in names]
                methods = [child.name for child in node.body if isinstance(child, ast.FunctionDef)]
                if bases:
                    found.overrides[f"{path.relative_to(PACKAGE)}:{node.name}"] = bases, methods
            if isinstance(node, ast.FunctionDef):
                found.members |= set(_wrapped(node, names))
    found.symbols |= {owner for owner, _ in found.members}
    return found


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}:{alias.name}"


def _wrapped(function: ast.FunctionDef, imported: dict[str, str]) -> Iterator[tuple[str, str]]:
    """``wrap(Owner, "name", ...)`` in this function, whose own variables may hold ``import_module("m").Owner``."""
    names = dict(imported)
    for node in ast.walk(function):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Attribute)
            and isinstance(node.targets[0], ast.Name)
        ):
            call = node.value.value
            if (
                isinstance(call, ast.Call)
                and _called(call) == "import_module"
                and isinstance(call.args[0], ast.Constant)
            ):
                names[node.targets[0].id] = f"{call.args[0].value}:{node.value.attr}"
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and _called(node) == "wrap":
            owner, name = node.args[:2]
            if isinstance(owner, ast.Name) and isinstance(name, ast.Constant) and owner.id not in PYTHONS:
                yield names[owner.id], str(name.value)


def _base_name(node: ast.expr) -> str:
    node = node.value if isinstance(node, ast.Subscript) else node
    return node.id if isinstance(node, ast.Name) else ""


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
