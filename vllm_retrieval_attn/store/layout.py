"""Where everything lies in the one shared-memory file of a rank: control block, then pages.

The file is ``[words | tables | numbers | queries | partials | pages ...]``. Sizes depend only on
the fields of :class:`Layout`, which the vLLM worker makes and the Ray actors receive, so both
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
FIXED_WORDS = 3

# per lane: done, sleeping, client waits for it; per actor: pid
LANE_DONE, LANE_SLEEPING, LANE_AWAITED = 0, 1, 2
LANE_WORDS = 3

# int64 numbers of the request message
MSG_LAYER, MSG_ROWS = 0, 1
MSG_HEADER = 2
ROW_TABLE, ROW_TOKENS, ROW_Q = 0, 1, 2
"""A row of the message: its page table, its host tokens, its row in the queries."""
ROW_FIELDS = 3

# int64 numbers per lane: nanoseconds of the last search, keys it scored
STAT_NS, STAT_KEYS = 0, 1
STAT_FIELDS = 2


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

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def lanes(self) -> int:
        return self.actors * self.threads

    @property
    def words(self) -> int:
        return FIXED_WORDS + self.lanes * LANE_WORDS + self.actors

    @property
    def tables_offset(self) -> int:
        return _round_up(self.words * _LINE, _ALIGN)

    @property
    def numbers_offset(self) -> int:
        return _round_up(self.tables_offset + self.max_rows * self.table_pages * 8, _ALIGN)

    @property
    def numbers(self) -> int:
        return MSG_HEADER + self.max_rows * ROW_FIELDS + self.lanes * STAT_FIELDS

    @property
    def queries_offset(self) -> int:
        return _round_up(self.numbers_offset + self.numbers * 8, _ALIGN)

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
    def pages_offset(self) -> int:
        partials = self.actors * self.actor_partials * self.partial_floats * 4
        return _round_up(self.partials_offset + partials, 2 << 20)

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
