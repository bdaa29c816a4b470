# SPDX-License-Identifier: Apache-2.0
"""Where everything lies in the one shared-memory file of a rank: control block, then pages.

Pages lie as [layer][page][kv_head][token][2][d]: what one layer of a step reads then spans the least memory. Rows that
an H100 read from within about 1 GB crossed PCIe at 48 GB/s, and at 20 to 25 GB/s from a wider range
(docs/benchmarks.md, 2026-11-25): so many addresses do not fit the caches that translate them.

Its parts, in order, are those of :attr:`Layout.parts`, then the pages. Sizes depend only on the fields of
:class:`Layout`, which the vLLM worker makes and the Ray actors receive, so both sides compute the same offsets. The
file is sparse: what live requests do not use takes no memory.
"""

from dataclasses import dataclass
from functools import cached_property

from vllm_retrieval_attn.sketch.sampling import TILE

LINE = 64  # bytes of a cache line: every polled word has a line of its own
_ALIGN = 4096

# int32 words, one a cache line
WORD_SEQ = 0
"""Number of the newest request."""
WORD_STOP = 1
"""1: actors leave their loops."""
WORD_CLIENT_PID = 2
WORD_PROBES = 3
"""Number of decode steps ever handed over for comparison with exact search."""
WORD_GROWTH = 4
"""Raised whenever a slot has more to index."""
WORD_AWAKE = 5
"""1 while a GPU posts messages, which wakes nobody: leaders look for them without sleeping."""
WORD_GIVEN_UP = 6
"""The step (MSG_STEP) in which the GPU is to wait for no answer any more."""
FIXED_WORDS = 7

# per actor: message done, sleeping, client waits for it, pid, probes done
ACTOR_DONE, ACTOR_SLEEPING, ACTOR_AWAITED, ACTOR_PID, ACTOR_PROBES = range(5)
ACTOR_WORDS = 5

# int64 numbers of a page table's owner
SLOT_GENERATION, SLOT_INDEXED, SLOT_SPACE = range(3)
"""Raised when the table changes hands, 0 while nobody has it; host tokens that may be indexed; the space that codes
them (sketch/space.py)."""
SLOT_FIELDS = 3

# int64 numbers of the request message
MSG_LAYER, MSG_ROWS, MSG_PROBE, MSG_STEP = range(4)
"""Which layer, how many rows, and the row whose choice is to be kept for comparison (-1: none). In a step whose
messages a GPU posts, the number of the first one, which asks for nothing but to get ready, and those of all layers
follow in order; otherwise 0."""
MSG_HEADER = 4
ROW_TABLE, ROW_GENERATION, ROW_TOKENS, ROW_INDEXED, ROW_POSITION, ROW_LIMIT, ROW_TAU, ROW_SEED = range(8)
"""A row of the message: its page table and that table's generation; its host tokens, and how many leading ones are
searched through the index, the others exactly; its position; how many rows to read, from which weight on always (in
units of TAU_UNIT), and the request's seed. Row r of the message has row r of the queries."""
ROW_FIELDS = 8
TAU_UNIT = 1e-12

# int64 numbers per actor: nanoseconds of the last search, keys scored by code, rows read
STAT_NS, STAT_CODES, STAT_ROWS = 0, 1, 2
STAT_FIELDS = 3

PROBE_VALID, PROBE_ROW = 0, 1
"""int64 numbers of a probe: 0 once its request ended, then its row of the message."""
FIDELITY_HEADS, FIDELITY_RECALL, FIDELITY_MASS, FIDELITY_ERROR, FIDELITY_BIAS = range(5)
"""float64 sums of a probe, for each actor and layer: query heads compared, recall@100, mass of the rows read, output
error, and signed error of the log-sum-exp."""
FIDELITY_FIELDS = 5


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Layout:
    """Shapes of one rank's arena; every count is per rank.

    Attributes:
        layers: layers whose K and V the arena holds.
        heads, kv_heads, dim: query heads, KV heads, head size.
        itemsize: bytes of a stored element; ``dtype_code``: its type (index/rows.py).
        page_tokens: tokens of a page, the unit of allocation.
        pages: capacity in pages.
        max_rows: rows of a message, also the number of page tables.
        table_pages: pages that one request may own.
        actors, threads: Ray actors of this rank and search threads in each.
        most_limit: most rows that a request may ask to read for a KV head.
        first_head: number of this rank's first KV head in the whole model.
        indexed: whether there is an index at all.
        pages_at: where the pages begin in the memory of the vLLM worker; 0: they lie in the file.
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
    most_limit: int = 1024
    first_head: int = 0
    indexed: bool = False
    pages_at: int = 0

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def words(self) -> int:
        return FIXED_WORDS + self.actors * ACTOR_WORDS

    @property
    def partial_floats(self) -> int:
        """float32 of a partial result: ``group`` outputs, then ``group`` log-sum-exps."""
        return self.group * (self.dim + 1)

    @property
    def space_floats(self) -> int:
        """float32 of one KV head's learned space: mean, keys' and queries' transform."""
        return self.dim * (1 + 2 * self.dim)

    @property
    def probe_floats(self) -> int:
        """float32 of a query head and layer: the query, the host's output and the paged output, then their LSEs."""
        return 3 * self.dim + 2

    @property
    def most_chosen(self) -> int:
        """Most rows ever chosen for a KV head: those asked for, and one a tile (sketch/sampling.py)."""
        return self.most_limit + -(-self.table_pages * self.page_tokens // TILE)

    @property
    def probe_numbers(self) -> int:
        return PROBE_ROW + ROW_FIELDS

    @cached_property
    def parts(self) -> dict[str, tuple[int, int]]:
        """Offset and bytes of every part before the pages, in order."""
        sizes = {
            "words": self.words * LINE,
            "tables": self.max_rows * self.table_pages * 8,
            "slots": self.max_rows * SLOT_FIELDS * 8,
            "numbers": (MSG_HEADER + self.max_rows * ROW_FIELDS + self.actors * STAT_FIELDS) * 8,
            "queries": self.max_rows * self.heads * self.dim * self.itemsize,
            "outside": self.max_rows * self.heads * 4,
            "read": self.max_rows * self.kv_heads * 4,
            "partials": self.max_rows * self.kv_heads * self.partial_floats * 4,
            "spaces": self.layers * self.kv_heads * self.space_floats * 4 if self.indexed else 0,
            "chosen": self.layers * self.kv_heads * (1 + self.most_chosen) * 4,
            "probe": self.probe_numbers * 8
            + self.actors * self.layers * FIDELITY_FIELDS * 8
            + self.layers * self.heads * self.probe_floats * 4,
        }
        found, offset = {}, 0
        for name, size in sizes.items():
            found[name] = (offset, size)
            offset += _round_up(size, _ALIGN)
        return found

    @property
    def pinned_bytes(self) -> int:
        """Bytes from the file's start that the GPU reads and writes."""
        return self.parts["spaces"][0]

    @property
    def pages_offset(self) -> int:
        offset, size = self.parts["probe"]
        return _round_up(offset + size, 2 << 20)

    @property
    def row_elements(self) -> int:
        """Elements of a row: a key and its value, side by side."""
        return 2 * self.dim

    @property
    def head_elements(self) -> int:
        """Elements of one KV head in one page."""
        return self.page_tokens * self.row_elements

    @property
    def page_elements(self) -> int:
        """Elements of one layer in one page: (kv_heads, page_tokens, 2, dim); from one page of a layer to the next."""
        return self.kv_heads * self.head_elements

    @property
    def layer_elements(self) -> int:
        """Elements from one layer to the next."""
        return self.pages * self.page_elements

    @property
    def page_layer_bytes(self) -> int:
        """Bytes of one layer in one page."""
        return self.page_elements * self.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers together."""
        return self.layers * self.page_layer_bytes

    @property
    def file_bytes(self) -> int:
        return self.pages_offset + (0 if self.pages_at else self.all_pages_bytes)

    @property
    def all_pages_bytes(self) -> int:
        return self.pages * self.page_bytes

    def page_tokens_owned(self, tokens: int) -> int:
        """Pages that ``tokens`` host tokens take."""
        return -(-tokens // self.page_tokens)
