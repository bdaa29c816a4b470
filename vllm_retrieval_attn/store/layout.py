"""Where everything lies in the one shared-memory file of a rank: control block, then pages.

The file is ``[words | tables | numbers | jobs | queries | partials | statistics | probe | turns | slabs | pages ...]``.
Sizes depend only on the fields of :class:`Layout`, which the vLLM worker makes and the Ray actors receive, so both
sides compute the same offsets.
"""

from dataclasses import dataclass

_LINE = 64  # bytes of a cache line: every polled word has a line of its own
_ALIGN = 4096

# int32 words, one a cache line
WORD_SEQ = 0
"""Number of the newest request."""
WORD_STOP = 1
"""1: actors leave their loops."""
WORD_CLIENT_PID = 2
WORD_JOBS = 3
"""Number of index builds ever queued."""
WORD_PROBES = 4
"""Number of decode steps ever handed over for comparison with exact search."""
FIXED_WORDS = 5

# per lane: done, sleeping, client waits for it; per actor: pid, builds done, slab it writes to (-1: none), probes done
LANE_DONE, LANE_SLEEPING, LANE_AWAITED = 0, 1, 2
LANE_WORDS = 3
ACTOR_PID, ACTOR_JOBS, ACTOR_SLAB, ACTOR_PROBES = 0, 1, 2, 3
ACTOR_WORDS = 4

# int64 numbers of the request message
MSG_LAYER, MSG_ROWS = 0, 1
MSG_HEADER = 2
ROW_TABLE, ROW_TOKENS, ROW_Q, ROW_INDEXED, ROW_BUDGET, ROW_RERANK, ROW_TAIL = range(7)
"""A row of the message: its page table, its host tokens, its row in the queries; how many leading segments to search by
their index, and how: millionths of the keys to scan (0: as calibrated), keys to re-rank, whether to estimate the
tail."""
ROW_FIELDS = 7

# int64 numbers per lane: nanoseconds of the last search, keys scored by code, keys read exactly
STAT_NS, STAT_CODES, STAT_KEYS = 0, 1, 2
STAT_FIELDS = 3

JOB_GENERATION, JOB_TABLE, JOB_SEGMENT, JOB_SLAB, JOB_KIND = range(5)
"""An index build: generation of the slab (a build of an older one is dropped), page table, segment number, slab, and
what to do."""
JOB_BUILD, JOB_REFRESH = 0, 1
"""Build the slab; look whether its calibration still fits the queries, and calibrate again where it does not."""
JOB_FIELDS = 5
JOBS = 4096
"""Builds that may wait."""

PROBE_VALID, PROBE_ROW = 0, 1
"""int64 numbers of a probe: 0 once its request ended, then its row of the message."""
FIDELITY_HEADS, FIDELITY_RECALL, FIDELITY_MASS, FIDELITY_ERROR = range(4)
"""float64 sums of the last probe over an actor's query heads, for each layer."""
FIDELITY_FIELDS = 4


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Layout:
    """Shapes of one rank's arena; every count is per rank.

    Attributes:
        layers: layers whose K and V the arena holds.
        heads, kv_heads, dim: query heads, KV heads, head size.
        itemsize: bytes of a stored element; ``dtype_code``: its type (index/kernels.py).
        page_tokens: tokens of a page, the unit of allocation.
        pages: capacity in pages.
        max_rows: rows of a message, also the number of page tables.
        table_pages: pages that one request may own.
        actors, threads: Ray actors of this rank and search threads in each.
        segment_tokens: tokens of an indexed segment. slabs: segments that may be indexed, 0 without an index.
        slab_bytes: of one layer and KV head (index/segment.py).
        samples: queries kept for each query head, to calibrate with: of the prompt, later of what is generated.
    """

    layers: int
    heads: int
    kv_heads: int
    dim: int
    itemsize: int
    dtype_code: int
    page_tokens: int
    pages: int
    max_rows: int
    table_pages: int
    actors: int
    threads: int
    segment_tokens: int = 8192
    slabs: int = 0
    slab_bytes: int = 0
    samples: int = 16

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def lanes(self) -> int:
        return self.actors * self.threads

    @property
    def words(self) -> int:
        return FIXED_WORDS + self.lanes * LANE_WORDS + self.actors * ACTOR_WORDS

    @property
    def tables_offset(self) -> int:
        return _round_up(self.words * _LINE, _ALIGN)

    @property
    def table_segments(self) -> int:
        """Segments that one request may own."""
        return self.table_pages * self.page_tokens // self.segment_tokens + 1

    @property
    def slab_tables_offset(self) -> int:
        return _round_up(self.tables_offset + self.max_rows * self.table_pages * 8, _ALIGN)

    @property
    def numbers_offset(self) -> int:
        return _round_up(self.slab_tables_offset + self.max_rows * self.table_segments * 8, _ALIGN)

    @property
    def numbers(self) -> int:
        return MSG_HEADER + self.max_rows * ROW_FIELDS + self.lanes * STAT_FIELDS

    @property
    def jobs_offset(self) -> int:
        """Queued builds, then for each slab its generation and, for each actor, the generation last built."""
        return _round_up(self.numbers_offset + self.numbers * 8, _ALIGN)

    @property
    def queries_offset(self) -> int:
        numbers = (JOBS * JOB_FIELDS if self.slabs else 0) + self.slabs * (1 + self.actors)
        return _round_up(self.jobs_offset + numbers * 8, _ALIGN)

    @property
    def partials_offset(self) -> int:
        return _round_up(self.queries_offset + self.max_rows * self.heads * self.dim * self.itemsize, _ALIGN)

    @property
    def actor_heads(self) -> int:
        """Most KV heads of one actor: head ``h`` belongs to actor ``h % actors``."""
        return -(-self.kv_heads // self.actors)

    @property
    def actor_partials(self) -> int:
        """Slots for partial results of one actor: a unit cut by lanes has one for each lane."""
        return self.max_rows * self.actor_heads + self.threads

    @property
    def partial_floats(self) -> int:
        """float32 of a slot: ``group`` outputs, then ``group`` log-sum-exps."""
        return self.group * (self.dim + 1)

    @property
    def head_statistics(self) -> int:
        """float32 of a KV head's query statistics: second moment, sampled queries, their log-sum-exps."""
        return self.dim * self.dim + self.group * self.samples * (self.dim + 1)

    @property
    def statistics_offset(self) -> int:
        partials = self.actors * self.actor_partials * self.partial_floats * 4
        return _round_up(self.partials_offset + partials, _ALIGN)

    @property
    def probe_offset(self) -> int:
        """A decode row to compare with exact search: its numbers, what it found in each layer, and the result."""
        rows = self.max_rows if self.slabs else 0
        return _round_up(self.statistics_offset + rows * self.layers * self.kv_heads * self.head_statistics * 4, _ALIGN)

    @property
    def probe_floats(self) -> int:
        """float32 of a query head and layer: the query, the host's output and the paged output, then their LSEs."""
        return 3 * self.dim + 2

    @property
    def probe_bytes(self) -> int:
        """Bytes of numbers, results and floats, in that order."""
        numbers = PROBE_ROW + ROW_FIELDS + self.actors * self.layers * FIDELITY_FIELDS
        return numbers * 8 + self.layers * self.heads * self.probe_floats * 4 if self.slabs else 0

    @property
    def turn_bytes(self) -> int:
        """Bytes of one head's query transform, (d, d) bfloat16."""
        return self.dim * self.dim * 2

    @property
    def turns_offset(self) -> int:
        return _round_up(self.probe_offset + self.probe_bytes, _ALIGN)

    @property
    def slabs_offset(self) -> int:
        rows = self.max_rows if self.slabs else 0
        return _round_up(self.turns_offset + rows * self.layers * self.kv_heads * self.turn_bytes, _ALIGN)

    @property
    def pages_offset(self) -> int:
        return _round_up(self.slabs_offset + self.slabs * self.segment_slab_bytes, 2 << 20)

    @property
    def segment_slab_bytes(self) -> int:
        """Bytes of a segment's index, all layers and KV heads."""
        return self.layers * self.kv_heads * self.slab_bytes

    @property
    def head_elements(self) -> int:
        """Elements of K (or V) of one KV head in one page."""
        return self.page_tokens * self.dim

    @property
    def page_layer_bytes(self) -> int:
        """Bytes of one layer in one page: (kv_heads, 2, page_tokens, dim)."""
        return self.kv_heads * 2 * self.head_elements * self.itemsize

    @property
    def page_bytes(self) -> int:
        return self.layers * self.page_layer_bytes

    @property
    def file_bytes(self) -> int:
        return self.pages_offset + self.pages * self.page_bytes

    def page_tokens_owned(self, tokens: int) -> int:
        """Pages that ``tokens`` host tokens take."""
        return -(-tokens // self.page_tokens)
