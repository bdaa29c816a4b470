# SPDX-License-Identifier: Apache-2.0
"""When the kernels of one layer run inside a CUDA graph: time stamps of the GPU, by CUPTI through torch.profiler."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

KERNELS = {
    "write_tokens": "write", "score_keys": "score", "weigh_keys": "weigh", "gather_rows": "gather",
    "merge_parts": "merge",
}  # fmt: skip
"""Kernels of a layer, in order, and what pictures call them."""


class Event(NamedTuple):
    """A kernel that ran; times in microseconds from anywhere."""

    name: str
    begin: float
    end: float


def layer_spans(events: Iterable[Event], layer: int) -> list[dict[str, Any]]:
    """Name, begin and end of each of our kernels in the ``layer``-th layer of a step, from its first kernel on.

    Raises:
        ValueError: there are not so many layers, or a layer is not whole.
    """
    ours = sorted((event for event in events if event.name in KERNELS), key=lambda event: event.begin)
    members = ours[layer * len(KERNELS) : (layer + 1) * len(KERNELS)]
    if [event.name for event in members] != list(KERNELS):
        raise ValueError(f"layer {layer} is not whole: {[event.name for event in members]}")
    return [
        {
            "name": KERNELS[event.name],
            "begin_us": round(event.begin - members[0].begin, 2),
            "end_us": round(event.end - members[0].begin, 2),
        }
        for event in members
    ]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments as bench/kernels.py's; returns those that say what was measured, with the ``spans`` of a layer in the
    middle of a graph whose caches are warm."""
    import torch

    from vllm_retrieval_attn.bench.kernels import Decode

    decode = Decode(args)
    try:
        decode.describe(args.tokens)
        graph = decode.graph(len(KERNELS))
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graph.replay()
            torch.cuda.synchronize()
        spans = layer_spans(_events(profile.events() or []), args.layers // 2)
    finally:
        decode.host.close()
    asked = {name: getattr(args, name) for name in ("tokens", "rows_batch", "rows")}
    return {**asked, "spans": spans, "layer_us": spans[-1]["end_us"], "device": torch.cuda.get_device_name()}


def _events(found: Sequence[Any]) -> Iterable[Event]:
    for event in found:
        if str(event.device_type).endswith("CUDA"):
            yield Event(event.name, event.time_range.start, event.time_range.end)
