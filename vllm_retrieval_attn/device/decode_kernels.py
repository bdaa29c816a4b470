# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of a decode step: compiled, loaded and launched. decode.cu says what they do, decode_twin.py how.

Every launch goes to torch's current stream, allocates nothing, waits for nothing and reads nothing back, so that all
may be captured into a CUDA graph. NVRTC and cuda.bindings come with torch.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_retrieval_attn.device.decode_step import MOST_LAYERS, PAGE, TILES, Geometry
from vllm_retrieval_attn.device.launching import Kernels, failed, packed
from vllm_retrieval_attn.sketch.sampling import TILE

_MAIN = "decode.cu"
_THREADS = {
    "write_tokens": 512, "encode_tokens": 256, "score_keys": 256, "weigh_keys": 256, "gather_rows": 256,
    "merge_parts": 512, "list_rows": 256, "write_layers": 512, "fetch_pages": 512,
}  # fmt: skip
_CHAINED = ("score_keys",)
"""Kernels that may begin before the one ahead of them ends (decode_common.cuh). With all of them a layer took 20 us
more (docs/benchmarks.md, 2026-11-25): early blocks of ``gather_rows`` and ``merge_parts`` are in the way of those
that fetch."""
_FETCH_BLOCKS = 16
"""Of fetch_pages: a few more than keep the link busy, as others run beside it (docs/benchmarks.md, 2026-11-25)."""
_BIN_WORDS = 257


class Buffers(NamedTuple):
    """Memory that outlives a step.

    Attributes:
        arena: device-usable address of the pinned host arena, [layer][host page][kv_head][token][2][d] of the dtype.
        sketch: uint8, [sketch page][layer][kv_head] blocks of Geometry.block_bytes.
        mean: (2, L, H, d); keys, queries: (2, L, H, d, d): float32, the constant rotation and the learned space.
        descriptor: int64, Geometry.descriptor_numbers, filled as decode_step.describe does.
    """

    arena: int
    sketch: torch.Tensor
    mean: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor
    descriptor: torch.Tensor


class Scratch(NamedTuple):
    """What kernels hand to one another within a layer; all layers use the same.

    An item is a page of one (row, KV head), numbered as decode_step.items_of says.

    Attributes:
        digits: (R, H, fragments, 8, P) int8, queries in the order of matrix columns: first and second digit by turns.
        asked: (R, H, G, 4) int32: half the unit and the bias (float32 bits), 15 times the digits' sum, unused.
        scores: (items, tiles, G, 128) float16 relative to tops: (items, tiles, G) float32.
        records: (items, G, 2) float32, top score of a page and sum of exponentials.
        shares: (R, H, G, 2) float32, top score of the whole attention and 1 / sum of exponentials.
        bins: (R, H, 257) int64, histogram of weights. taus: (R, H) float32.
        counts: (runs,) int32 keys taken of RUN neighbouring items. ticket: (1,) int32, the next run that nobody takes.
        taken: (items, 256) uint8, bit k of byte b: key 4 b + k of the page.
        sums: (runs, G, d) float32, stats: (runs, G, 2) float32: a run's partial, unnormalised, with top and total.
        read: (R + STAMPS,) int64, rows read, ever growing; then time stamps (parts_of).
    """

    digits: torch.Tensor
    asked: torch.Tensor
    scores: torch.Tensor
    tops: torch.Tensor
    records: torch.Tensor
    shares: torch.Tensor
    bins: torch.Tensor
    taus: torch.Tensor
    counts: torch.Tensor
    ticket: torch.Tensor
    taken: torch.Tensor
    sums: torch.Tensor
    stats: torch.Tensor
    read: torch.Tensor

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self)


def _parts(g: Geometry) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    unit = (g.rows, g.kv_heads)
    return {
        "digits": ((*unit, g.fragments, 8, g.padded), torch.int8),
        "asked": ((*unit, g.group, 4), torch.int32),
        "scores": ((g.items, TILES, g.group, TILE), torch.float16),
        "tops": ((g.items, TILES, g.group), torch.float32),
        "records": ((g.items, g.group, 2), torch.float32),
        "shares": ((*unit, g.group, 2), torch.float32),
        "bins": ((*unit, _BIN_WORDS), torch.int64),
        "taus": (unit, torch.float32),
        "counts": ((g.runs,), torch.int32),
        "ticket": ((1,), torch.int32),
        "taken": ((g.items, PAGE // 4), torch.uint8),
        "sums": ((g.runs, g.group, g.dim), torch.float32),
        "stats": ((g.runs, g.group, 2), torch.float32),
        "read": ((g.rows + STAMPS,), torch.int64),
    }


def scratch(geometry: Geometry, device: torch.device | str = "cuda") -> Scratch:
    """Allocate scratch, once; ``.bytes`` tells its size."""
    return Scratch(**{n: torch.zeros(shape, dtype=t, device=device) for n, (shape, t) in _parts(geometry).items()})


def scratch_bytes(geometry: Geometry) -> int:
    """Bytes that :func:`scratch` would allocate."""
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in _parts(geometry).values())


STAMPS = 7
"""Numbers behind the rows of Scratch.read: layers seen, and sums over them of the GPU's clock where each part begins,
and where the last ends."""
TIMED = ("write", "score", "weigh", "gather", "merge")


def parts_of(stamps: npt.NDArray[np.int64]) -> dict[str, float]:
    """Mean seconds of each part of a layer, from one part's begin to the next's; the attention to the window counts to
    ``score``, beside which it runs. Empty if no layer was seen."""
    if stamps[0] <= 0:
        return {}
    with np.errstate(over="ignore"):  # sums are modulo 2^64, so their differences are right
        sums = np.diff(stamps[1:])
    return {part: float(total) * 1e-9 / float(stamps[0]) for part, total in zip(TIMED, sums, strict=True)}


class DecodeKernels:
    """The kernels of one geometry, loaded on the current device.

    A layer is ``write``, ``score``, ``weigh``, ``gather``, ``merge``, in this order on one stream; FlashAttention's
    part must be there before ``weigh``. Rows beyond the descriptor's, and rows without host tokens, are left alone.
    """

    def __init__(self, geometry: Geometry, buffers: Buffers, work: Scratch) -> None:
        self.geometry, self.buffers, self.work = geometry, buffers, work
        self._kernels = kernels = Kernels(
            _MAIN, geometry.dim, geometry.group, geometry.dtype, _THREADS, buffers.sketch.device
        )
        every = kernels.multiprocessors
        units = geometry.rows * geometry.kv_heads
        grids = {
            "write_tokens": min(2 * units, 2 * every),
            "merge_parts": min(units * geometry.group, 4 * every),
            "list_rows": min(units, 2 * every),
            "encode_tokens": 8 * every,
            "write_layers": min(geometry.layers * units, 4 * every),
            "fetch_pages": _FETCH_BLOCKS,
        }
        for name in ("score_keys", "weigh_keys", "gather_rows"):
            grids[name] = min(kernels.resident(name), geometry.items)
        for name, blocks in grids.items():
            kernels.set_grid(name, blocks, kernels.chains and name in _CHAINED)
        self.move(buffers)

    def move(self, buffers: Buffers) -> None:
        """Use other buffers from now on; a graph that is captured already keeps those that it knows."""
        self.buffers = buffers
        self._check_buffers()
        self._state = self._packed_state()

    def _packed_state(self) -> np.ndarray[Any, Any]:
        """Struct State of decode_common.cuh."""
        g, b = self.geometry, self.buffers
        fixed = (g.layers, g.kv_heads, g.rows, g.entries, g.host_pages, g.sketch_pages, g.first_head)
        addresses = (b.descriptor, b.sketch, b.arena, b.mean, b.keys, b.queries)
        return packed(*fixed, float(g.scale), *addresses, *self.work)

    def _check_buffers(self) -> None:
        g, b = self.geometry, self.buffers
        shape = (2, g.layers, g.kv_heads, g.dim)
        wanted = {
            "sketch": (b.sketch, g.sketch_pages * g.sketch_page_bytes, torch.uint8),
            "mean": (b.mean, int(np.prod(shape)), torch.float32),
            "keys": (b.keys, int(np.prod(shape)) * g.dim, torch.float32),
            "queries": (b.queries, int(np.prod(shape)) * g.dim, torch.float32),
            "descriptor": (b.descriptor, g.descriptor_numbers, torch.int64),
        }
        for name, (part, size, dtype) in wanted.items():
            if part.numel() < size or part.dtype != dtype or not part.is_contiguous() or not part.is_cuda:
                raise failed(f"buffer {name}", f"needs {size} contiguous {dtype} on the GPU, has {part.numel()}")
        if b.arena % 16 or b.sketch.data_ptr() % 16:
            raise failed("buffers", "arena and sketch must be aligned to 16 bytes")

    def _launch(self, name: str, *more: np.ndarray[Any, Any]) -> None:
        self._kernels.launch(name, self._state, *more)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor) -> None:
        """K and V of the rows' new tokens to their host pages, their codes to the sketch, the queries as integers.

        Args:
            key, value: (R, H, d) of the dtype, dense last axis, 16-byte aligned rows. query: (R, H * G, d).
        """
        for part in (key, value):
            if part.stride(-1) != 1 or part.stride(0) % 8 or part.stride(1) % 8 or part.data_ptr() % 16:
                raise failed("decode kernels", "keys and values need 16-byte aligned rows")
        strides = (part.stride(axis) for part in (key, value, query) for axis in (0, 1))
        self._launch("write_tokens", packed(layer, key, value, query, *strides))

    def write_layers(self, caches: list[torch.Tensor], slots: list[torch.Tensor]) -> None:
        """What :meth:`write` does for keys and values, of all layers at once, from the paged cache.

        Args:
            caches: of each layer (blocks, H, block, 2 * d), all with the same strides, dense last axis.
            slots: of each layer (R,) int64 contiguous, -1 for a row of padding.
        """
        first = caches[0]
        if any(cache.stride() != first.stride() or cache.data_ptr() % 16 for cache in caches) or first.stride(-1) != 1:
            raise failed("decode kernels", "the layers' paged caches are not alike")
        spare = (0,) * (MOST_LAYERS - len(caches))
        shape = (first.shape[2], first.stride(0), first.stride(1), first.stride(2))
        self._launch("write_layers", packed(*shape, *caches, *spare, *slots, *spare))

    def encode(self, layer: int, places: torch.Tensor, targets: torch.Tensor) -> None:
        """Codes and steps of many tokens.

        Args:
            places: (T, H, d) float32 contiguous coordinates. targets: (T, 2) int64 contiguous, sketch page and offset
                of each token; a page of -1: not coded.
        """
        self._launch("encode_tokens", packed(layer), packed(places), packed(targets), packed(len(targets)))

    def fetch(self, layer: int, pages: torch.Tensor, out: torch.Tensor) -> None:
        """Copy host pages (n,) int64 of a layer into ``out`` (n, H, PAGE, 2, d) of the dtype, contiguous."""
        self._launch("fetch_pages", packed(layer, pages, len(pages), out))

    def score(self, layer: int) -> None:
        """Estimated scores of all coded keys of the rows that have more of them than their limit."""
        self._launch("score_keys", packed(layer))

    def weigh(self, lse: torch.Tensor) -> None:
        """Weights and their histogram. lse: (H * G, R) float32 of the paged part, +-inf where it has no keys."""
        self._launch("weigh_keys", packed(lse, lse.stride(0), lse.stride(1)))

    def gather(self, layer: int, query: torch.Tensor) -> None:
        """Choose rows and attend to them. query: (R, H * G, d)."""
        self._launch("gather_rows", packed(layer, query, query.stride(0), query.stride(1)))

    def merge(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge into ``out`` (R, H * G, d) of the dtype, whose log-sum-exp is ``lse`` as in :meth:`weigh`."""
        paged = packed(lse, lse.stride(0), lse.stride(1))
        self._launch("merge_parts", paged, packed(out, out.stride(0), out.stride(1)))

    def before(self, layer: int, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor) -> None:
        """What of a layer does not need FlashAttention's part."""
        self.write(layer, key, value, query)
        self.score(layer)

    def after(self, layer: int, query: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        """What does."""
        self.weigh(lse)
        self.gather(layer, query)
        self.merge(out, lse)

    def chosen(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows that the last :meth:`gather` read: ids (R, H, capacity) int32, host token numbers ascending; log pi,
        alike in float32; and their number (R, H) int32. Allocates: not for graphs."""
        shape, device = (self.geometry.rows, self.geometry.kv_heads, capacity), self.work.counts.device
        ids = torch.zeros(shape, dtype=torch.int32, device=device)
        log_pi = torch.zeros(shape, device=device)
        counts = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        self._launch("list_rows", packed(ids, log_pi, counts, capacity))
        return ids, log_pi, counts
