"""What the scheduler half of the connector and the worker half say to each other each step."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from vllm_retrieval_attn.options import SearchOptions


@dataclass
class StepMessage(KVConnectorMetadata):
    """Scheduler to worker.

    Attributes:
        admitted: request id -> epoch, for each scheduled request that may need the host.
        resident: ids of scheduled requests that never leave the paged cache.
        released: (request id, epoch) of admissions that ended (finish, abort, preemption).
        options: how to search, for requests admitted in this step whose options are not the default.
    """

    admitted: dict[str, int] = field(default_factory=dict)
    resident: set[str] = field(default_factory=set)
    released: list[tuple[str, int]] = field(default_factory=list)
    options: dict[str, SearchOptions] = field(default_factory=dict)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Worker to scheduler: requests whose host attention could not be computed this step."""

    failed: set[str] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerReport":
        assert isinstance(other, WorkerReport)
        return WorkerReport(self.failed | other.failed)
