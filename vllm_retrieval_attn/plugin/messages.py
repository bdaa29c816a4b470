# SPDX-License-Identifier: Apache-2.0
"""What the scheduler half of the connector and the worker half say to each other each step."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from vllm_retrieval_attn.core.options import SearchOptions
from vllm_retrieval_attn.core.prefixes import NOTHING, Match


@dataclass(frozen=True)
class Opening:
    """How an admission begins.

    Attributes:
        longest: tokens that it may come to.
        sink: slot that its sinks are to be written to, -1: none.
        match: what is there of its prompt. blocks: paged blocks to fill with it, of sinks and of the window.
    """

    longest: int
    sink: int = -1
    match: Match = NOTHING
    blocks: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


@dataclass
class StepMessage(KVConnectorMetadata):
    """Scheduler to worker.

    Attributes:
        admitted: request id -> epoch, for each scheduled request that may need the host.
        resident: ids of scheduled requests that never leave the paged cache.
        released: (request id, epoch) of admissions that ended (finish, abort, preemption).
        options: how to search, for requests admitted in this step whose options are not the default, and for sessions
            whose next chunk begins in it.
        opened: of requests admitted in this step, how they begin.
        kept: (request id, epoch, index of a page of it, number under which it is kept). dropped: numbers.
    """

    admitted: dict[str, int] = field(default_factory=dict)
    resident: set[str] = field(default_factory=set)
    released: list[tuple[str, int]] = field(default_factory=list)
    options: dict[str, SearchOptions] = field(default_factory=dict)
    opened: dict[str, Opening] = field(default_factory=dict)
    kept: list[tuple[str, int, int, int]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Worker to scheduler.

    Attributes:
        failed: requests whose host attention could not be computed this step.
        read: request id -> rows read in this step, summed over layers and KV heads, and how many of those.
        sketched: those of ``read`` whose rows were chosen on the GPU.
        degraded: requests for which the engine attended to the host itself, as the CPU workers were late or gone.
    """

    failed: set[str] = field(default_factory=set)
    read: dict[str, tuple[int, int]] = field(default_factory=dict)
    sketched: set[str] = field(default_factory=set)
    degraded: set[str] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerReport":
        assert isinstance(other, WorkerReport)
        read = dict(self.read)
        for request_id, (rows, searches) in other.read.items():
            mine = read.get(request_id, (0, 0))
            read[request_id] = mine[0] + rows, mine[1] + searches
        return WorkerReport(
            self.failed | other.failed, read, self.sketched | other.sketched, self.degraded | other.degraded
        )
