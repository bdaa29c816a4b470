"""Memory format of the attention index of one segment and KV head.

Keys are clustered into *leaves* (k-means, 16 keys each on average) and ordered by them; a *node* is 16 leaves that
lie close together. Everything is coded coarse to fine, each level what the one above left over:

    score(node) = q . mean + step_n * q~ . code8(node)        8 bits a dimension, two 4-bit planes
    score(leaf) = score(node) + step_l * q~ . code4(leaf)     4 bits, residual to the node's centroid
    score(key)  = score(leaf) + step_k * q~ . code4(key)      4 bits, residual to the leaf's centroid

where q~ is the query in the balanced space (index/spaces.py). The mean value of every four leaves stands beside.
The slab of a segment is plain bytes, so it may lie in shared memory and be built by one process and read by another.
"""

from dataclasses import dataclass
from functools import cached_property

from vllm_retrieval_attn.index.dot import row_bytes

LEAF = 16
"""Keys of a leaf on average."""
LEAVES = 16
"""Leaves of a node: one block of index/dot.py."""
NODE = LEAF * LEAVES
GROUP = 4
"""Leaves that share a mean value."""

STEP4 = 0.335
"""Step of the best uniform 4-bit quantizer of a normal variable, in standard deviations (Max, 1960)."""

HEAD_STATE, HEAD_TURN, HEAD_SHARE = 0, 1, 2
"""Numbers of the head (float64): 1 once built; element (2 bytes) in the slab memory where the query transform that the
segment was built with begins, (d, d) bfloat16; calibrated share of keys to scan."""
HEAD_NUMBERS = 8


def _round_up(value: int) -> int:
    return -(-value // 64) * 64


@dataclass(frozen=True)
class SegmentShape:
    """Where the parts of a slab lie, in bytes.

    Attributes:
        tokens: keys, a multiple of NODE below 65,536. dim: head size, a multiple of 8.
    """

    tokens: int
    dim: int

    def __post_init__(self) -> None:
        if self.tokens % NODE or self.dim % 8 or not 0 < self.tokens < 1 << 16:
            raise ValueError(
                f"a segment has a multiple of {NODE} tokens below {1 << 16}, and a head size that 8 divides; "
                f"not {self.tokens} and {self.dim}"
            )

    @property
    def nodes(self) -> int:
        return self.tokens // NODE

    @property
    def leaves(self) -> int:
        return self.tokens // LEAF

    @property
    def groups(self) -> int:
        """Groups of leaves that share a mean value."""
        return self.leaves // GROUP

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of 16 coded centroids."""
        return 8 * self.dim

    @property
    def node_blocks(self) -> int:
        return -(-self.nodes // 16)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Byte offset of each part; the last entry is the size."""
        parts = {
            "head": HEAD_NUMBERS * 8,
            "mean": self.dim * 4,  # float32
            "node_step": self.nodes * 4,  # float32
            "node_spread": self.nodes * 4,  # float32: mean square of the keys' residuals, a dimension
            "leaf_step": self.leaves * 4,
            "key_step": self.leaves * 4,
            "ends": self.leaves * 2,  # uint16: where each leaf ends in the order
            "node_codes": 2 * self.node_blocks * self.block_bytes,  # high plane, low plane
            "leaf_codes": self.nodes * self.block_bytes,
            "key_codes": self.tokens * row_bytes(self.dim),
            "order": self.tokens * 2,  # uint16: position in the segment of each key of the order
            "value_step": self.groups * 4,
            "values": self.groups * self.dim,  # int8
        }
        offsets, position = {}, 0
        for name, size in parts.items():
            offsets[name] = position
            position += _round_up(size)
        offsets["end"] = position
        return offsets

    @property
    def bytes(self) -> int:
        return self.offsets["end"]


def slab_bytes(kind: str, tokens: int, dim: int) -> int:
    """Bytes of a segment's slab of one layer and KV head. The kinds that keep their index elsewhere have a line, whose
    place tells which segment is meant."""
    return SegmentShape(tokens, dim).bytes if kind == "attention" else 64
