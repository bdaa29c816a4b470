"""The scheduler's account of host memory: who may hold how many arena pages.

Kept in EngineCore, in step with what the workers will really take: a request reserves its whole
prompt when it is admitted and grows page by page while it generates. Where a page is wanted and
none is free, the manager refuses the allocation and vLLM does what it does for paged blocks: a running
request preempts another. Who waits is asked about before (plugin/line.py).
"""

from dataclasses import dataclass, field

from vllm_retrieval_attn.core.ownership import Split, cdiv


@dataclass
class HostLedger:
    """Pages of one rank; all ranks are alike.

    Attributes:
        pages: capacity. page_tokens, split: as in ResolvedConfig.
    """

    pages: int
    page_tokens: int
    split: Split
    held: dict[str, int] = field(default_factory=dict)
    _resident_only: set[str] = field(default_factory=set)

    @property
    def free_pages(self) -> int:
        return self.pages - sum(self.held.values())

    @property
    def longest(self) -> int:
        """Tokens of a request that holds every page."""
        return self.split.sink_end + self.pages * self.page_tokens

    def arrived(self, request_id: str, max_tokens: int) -> None:
        """Note a request of at most ``max_tokens`` tokens (prompt and output); short ones never need the host."""
        if self.pages == 0 or self.split.never_leaves_pages(max_tokens):
            self._resident_only.add(request_id)

    def needs_host(self, request_id: str) -> bool:
        return request_id not in self._resident_only

    def required(self, request_id: str, tokens: int) -> int:
        """Pages beyond those held that ``tokens`` tokens of a request take."""
        if not self.needs_host(request_id):
            return 0
        pages = cdiv(max(0, tokens - self.split.sink_end), self.page_tokens)
        return max(0, pages - self.held.get(request_id, 0))

    def fits(self, request_id: str, tokens: int) -> bool:
        return self.required(request_id, tokens) <= self.free_pages

    def hold(self, request_id: str, tokens: int) -> None:
        """Take the pages for ``tokens`` tokens; ``fits`` must hold."""
        more = self.required(request_id, tokens)
        if more > self.free_pages:
            raise RuntimeError(f"ledger: {request_id} takes {more} pages, {self.free_pages} are free")
        if more:
            self.held[request_id] = self.held.get(request_id, 0) + more

    def release(self, request_id: str) -> None:
        """Give back what a request holds (finish, abort or preemption)."""
        self.held.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self.release(request_id)
        self._resident_only.discard(request_id)
