"""NumPy views of the shared file, the same in the vLLM worker and in the actors."""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_retrieval_attn.store.layout import (
    ACTOR_PID,
    ACTOR_PROBES,
    ACTOR_WORDS,
    FIDELITY_FIELDS,
    FIXED_WORDS,
    JOB_FIELDS,
    JOBS,
    LANE_WORDS,
    MSG_HEADER,
    PROBE_ROW,
    ROW_FIELDS,
    STAT_FIELDS,
    WORD_PROBES,
    Layout,
)

Array = npt.NDArray[Any]


class Views:
    """Arrays over one rank's shared file. The vLLM worker writes all but ``stats``, ``partials`` and lanes' words.

    Attributes:
        words: (words,) int32 polled words, strided to one a cache line.
        tables: (max_rows, table_pages) int64 page numbers of live requests.
        header, rows, stats: the request message and what lanes report.
        queries16, queries32: the query area as uint16 and as float32.
        partials: (actors, actor_partials, partial_floats) float32.
        pages16, pages32: all pages as uint16 and as float32 elements.
        slab_tables: (max_rows, table_segments) int64 byte offset in ``index8`` of each indexed segment's slab.
        jobs: (JOBS, JOB_FIELDS) int64 builds, a ring. generations: (slabs,) int64. built: (slabs, actors) int64.
        moments, samples, sample_lse: (max_rows, layers, kv_heads, ...) float32 statistics of queries: (d, d), (group,
            layout.samples, d) and (group, layout.samples), -inf where there is no sample. Views of ``statistics``.
        probe_numbers: (PROBE_ROW + ROW_FIELDS,) int64. probe: (layers, heads, probe_floats) float32.
        fidelity: (actors, layers, FIDELITY_FIELDS) float64, empty without an index.
        index8, index16, index32, index64: transforms and slabs, as int8, uint16, float32 and float64.
    """

    def __init__(self, layout: Layout, buffer: Any) -> None:
        raw = np.frombuffer(buffer, np.uint8)
        line = 16
        words = raw[: layout.words * line * 4].view(np.int32)
        self.words: Array = words[::line]
        tables = raw[layout.tables_offset :][: layout.max_rows * layout.table_pages * 8]
        self.tables: Array = tables.view(np.int64).reshape(layout.max_rows, layout.table_pages)
        slab_tables = raw[layout.slab_tables_offset :][: layout.max_rows * layout.table_segments * 8]
        self.slab_tables: Array = slab_tables.view(np.int64).reshape(layout.max_rows, layout.table_segments)
        numbers = raw[layout.numbers_offset :][: layout.numbers * 8].view(np.int64)
        self.header: Array = numbers[:MSG_HEADER]
        rows_end = MSG_HEADER + layout.max_rows * ROW_FIELDS
        self.rows: Array = numbers[MSG_HEADER:rows_end].reshape(layout.max_rows, ROW_FIELDS)
        self.stats: Array = numbers[rows_end:].reshape(layout.lanes, STAT_FIELDS)
        self.queries: Array = raw[layout.queries_offset :][
            : layout.max_rows * layout.heads * layout.dim * layout.itemsize
        ]
        self.queries16: Array = self.queries.view(np.uint16)
        self.queries32: Array = self.queries[: self.queries.size // 4 * 4].view(np.float32)
        partials = raw[layout.partials_offset :][: layout.actors * layout.actor_partials * layout.partial_floats * 4]
        self.partials: Array = partials.view(np.float32).reshape(
            layout.actors, layout.actor_partials, layout.partial_floats
        )
        jobs = raw[layout.jobs_offset : layout.queries_offset].view(np.int64)
        queue = JOBS * JOB_FIELDS if layout.slabs else 0
        self.jobs: Array = jobs[:queue].reshape(-1, JOB_FIELDS)
        self.generations: Array = jobs[queue : queue + layout.slabs]
        built = jobs[queue + layout.slabs :][: layout.slabs * layout.actors]
        self.built: Array = built.reshape(layout.slabs, layout.actors)
        statistics = raw[layout.statistics_offset : layout.probe_offset].view(np.float32)
        rows = layout.max_rows if layout.slabs else 0
        shape = (rows, layout.layers, layout.kv_heads, layout.head_statistics)
        self.statistics: Array = statistics[: int(np.prod(shape))].reshape(shape)
        # Splitting the last axis keeps these views of the shared memory.
        dim, samples = layout.dim, layout.group * layout.samples
        self.moments: Array = self.statistics[..., : dim * dim].reshape(*shape[:3], dim, dim)
        self.samples: Array = self.statistics[..., dim * dim :][..., : samples * dim].reshape(
            *shape[:3], layout.group, layout.samples, dim
        )
        self.sample_lse: Array = self.statistics[..., dim * dim + samples * dim :].reshape(
            *shape[:3], layout.group, layout.samples
        )
        probe = raw[layout.probe_offset :][: layout.probe_bytes]
        numbers_end = (PROBE_ROW + ROW_FIELDS) * 8
        actors = layout.actors if layout.slabs else 0
        fidelity_end = numbers_end + actors * layout.layers * FIDELITY_FIELDS * 8
        self.probe_numbers: Array = probe[:numbers_end].view(np.int64)
        self.fidelity: Array = (
            probe[numbers_end:fidelity_end].view(np.float64).reshape(actors, layout.layers, FIDELITY_FIELDS)
        )
        self.probe: Array = probe[fidelity_end:].view(np.float32).reshape(-1, layout.heads, layout.probe_floats)
        index = raw[layout.turns_offset : layout.pages_offset]
        self.index8: Array = index.view(np.int8)
        self.index16: Array = index.view(np.uint16)
        self.index32: Array = index.view(np.float32)
        self.index64: Array = index.view(np.float64)
        pages = raw[layout.pages_offset : layout.file_bytes]
        self.pages: Array = pages
        self.pages16: Array = pages.view(np.uint16)
        self.pages32: Array = pages.view(np.float32)
        self._actors = layout.actors
        self._lane_base = FIXED_WORDS
        self._actor_base = FIXED_WORDS + layout.lanes * LANE_WORDS

    def lane_word(self, lane: int, which: int) -> int:
        """Index into ``words`` of a lane's word."""
        return self._lane_base + lane * LANE_WORDS + which

    def actor_word(self, actor: int, which: int = ACTOR_PID) -> int:
        """Index into ``words`` of an actor's word; ACTOR_PID is 0 while it is not attached."""
        return self._actor_base + actor * ACTOR_WORDS + which

    def probing(self) -> bool:
        """Whether a probe has been handed over that not all actors are done with."""
        handed = int(self.words[WORD_PROBES])
        return any(int(self.words[self.actor_word(a, ACTOR_PROBES)]) != handed for a in range(self._actors))
