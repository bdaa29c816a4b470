# SPDX-License-Identifier: Apache-2.0
"""Names, kinds and texts of this backend's metrics, without their prefix ``vllm:retrieval_``."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from vllm_retrieval_attn.device.decode_kernels import TIMED

PATHS = ("sketch", "faiss", "exact", "degraded", "paged")
RESTARTS = ("died", "start", "silent", "asked", "supervisor")
PARTS = (*TIMED, "search")


class Metric(NamedTuple):
    """One of vLLM's metrics.

    Attributes:
        label: of its own, or none; values: those that are there from the start, at 0.
        over: how values of several ranks become one.
    """

    text: str
    label: str = ""
    over: Callable[[Iterable[float]], float] = sum
    values: tuple[str, ...] = ()


GAUGES = {
    "healthy": Metric(
        "1 while every CPU worker lives, 0 while the engine attends to host memory without them.", over=min
    ),
    "workers": Metric("CPU workers, by state: wanted, alive, silent (a message waits for them).", "state"),
    "workers_given_up": Metric("1 once CPU workers died so often that they are not started again.", over=max),
    "arena_bytes": Metric("Host memory for K and V, by kind: used, capacity.", "kind"),
    "arena_usage_ratio": Metric(
        "Used share of the host memory for K and V, of the rank that has least left.", over=max
    ),
    "sketch_bytes": Metric("GPU memory for codes of host keys, by kind: used, capacity.", "kind"),
    "sketch_usage_ratio": Metric("Used share of the GPU memory for codes, of the rank that has least left.", over=max),
    "host_tokens": Metric("Tokens of live requests that host memory holds.", over=max),
    "paged_tokens": Metric("Tokens of live requests that paged memory holds, sinks and windows above all."),
    "host_requests": Metric("Live requests that hold host memory.", over=max),
    "prefix_pages": Metric("Host pages kept for their prefix, by use: shared by live requests, idle.", "use"),
    "prefix_bytes": Metric("Host memory that these take."),
    "recall": Metric("Recall@100 of the rows read, running mean of compared steps.", "layers", min),
    "mass": Metric("Share of the attention that the rows read carry, likewise.", "layers", min),
    "output_error": Metric("Relative error of a layer's output against exact attention, likewise.", "layers", max),
    "lse_bias": Metric("Signed error of the log-sum-exp, likewise; the estimate is unbiased at 0.", "layers", max),
    "sample_timestamp_seconds": Metric("When the newest of these samples was taken, in seconds since 1970.", over=max),
}
COUNTERS = {
    "steps": Metric(
        "Engine steps by how they attended to host tokens of decoding requests: sketch, faiss, exact, degraded (by the "
        "engine itself, CPU workers being late or gone), paged (there were none).",
        "path", max, PATHS,
    ),
    "rows_read": Metric("Host rows read in decode steps, summed over layers and KV heads."),
    "searches": Metric("Steps of requests, times layers and KV heads, in which these were read."),
    "codes_scored": Metric("Codes scored in decode steps, summed over layers and KV heads."),
    "worker_restarts": Metric(
        "Restarts of CPU workers, by reason: died, start (it failed), silent, asked (by an operator), supervisor (it "
        "ended, and they with it).",
        "reason", values=RESTARTS,
    ),
    "requests_refused": Metric(
        "Requests refused at arrival, by reason: host_memory (the prompt is too long for it), arguments, draining.",
        "reason", values=("host_memory", "arguments", "draining"),
    ),
    "requests_cut": Metric("Requests whose max_tokens was lowered to where host memory ends."),
    "requests_failed": Metric(
        "Requests that ended with an error of this backend, by reason: search (the CPU workers'), outgrown (a session "
        "became longer than memory or model allow).",
        "reason", max, ("search", "outgrown"),
    ),
    "prefix_hits": Metric("Requests that began with what was kept of their prompt."),
    "prefix_hit_tokens": Metric("Prompt tokens that need not be computed for that."),
    "prefix_evicted_pages": Metric("Kept host pages that were dropped, as their memory was wanted."),
    "compared_steps": Metric("Decode steps compared with exact attention.", over=max),
}  # fmt: skip
HISTOGRAMS = {
    "request_host_tokens": Metric("Host tokens of finished requests."),
    "request_rows_read": Metric("Host rows read in a decode step, mean of a request that read any."),
    "layer_seconds": Metric(
        "Seconds of a layer in a decode step, mean of its layers, twice a second, by part: on the GPU write, score, "
        "weigh, gather, merge; search is the answer of the CPU workers.",
        "part", values=PARTS,
    ),
}  # fmt: skip
BUCKETS = {
    "request_host_tokens": [0, *(1 << n for n in range(10, 21))],
    "request_rows_read": [16, *(1 << n for n in range(5, 17))],
    "layer_seconds": [round(base * 10.0**power, 9) for power in range(-6, 0) for base in (1, 2.5, 5)],
}


def key(name: str, label: str = "") -> str:
    """A metric's value with its own label, as the stats carry it."""
    return f"{name}|{label}" if label else name
