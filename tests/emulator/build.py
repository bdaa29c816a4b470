# SPDX-License-Identifier: Apache-2.0
"""The decode kernels on a CPU: sources compiled by g++ with cuda_on_cpu.hpp, behind the interface of DecodeKernels."""

import ctypes
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from vllm_retrieval_attn.device import decode_kernels
from vllm_retrieval_attn.device.ask_kernels import _THREADS, AskKernels
from vllm_retrieval_attn.device.decode_kernels import DecodeKernels
from vllm_retrieval_attn.index.rows import DTYPE_CODES

AVAILABLE = shutil.which("g++") is not None
_DECODE = tuple(f"decode_{part}.cuh" for part in ("common", "write", "score", "weigh", "gather", "merge", "fetch"))
_OF_STATE = {
    "write_tokens": "*(NewTokens*)a[1]",
    "write_layers": "*(Slots*)a[1]",
    "encode_tokens": "*(i64*)a[1], *(const float**)a[2], *(const i64**)a[3], *(i64*)a[4]",
    "score_keys": "*(i64*)a[1]",
    "weigh_keys": "*(Paged*)a[1]",
    "gather_rows": "*(Queries*)a[1]",
    "merge_parts": "*(Paged*)a[1], *(Merged*)a[2]",
    "list_rows": "*(Lists*)a[1]",
    "fetch_pages": "*(Fetched*)a[1]",
}
_SIGNATURES = {"State": _OF_STATE, "Asking": dict.fromkeys(_THREADS, "*(Tokens*)a[1]")}
_PTX = (
    (r'asm\("cvt\.f32\.f16.*?\);', "y = ptx_of_half(x);"),
    (r'asm\("cvt\.rn\.f16\.f32.*?\);', "y = ptx_to_half(x);"),
    (r'asm\("cvt\.rn\.bf16\.f32.*?\);', "y = ptx_to_bfloat16(x);"),
    (r'asm volatile\("mov\.u64 %0, %%globaltimer.*?\);', "now = ptx_clock_ns();"),
    (r'asm\("mma\.sync.*?\);', "ptx_mma(c, a0, a1, a2, a3, b0, b1);"),
)
BLOCKS = 5
"""Blocks of every launch: few, so that a block meets several heads and rows."""


@cache
def library(sources: tuple[str, ...], state: str, dim: int, group: int, dtype: str) -> ctypes.CDLL:
    """Compile the kernels of some sources for one shape. ``state``: their first argument's type."""
    device, folder = Path(decode_kernels.__file__).parent, Path(mkdtemp(prefix="emulated-kernels-"))
    source = "\n".join((device / name).read_text() for name in sources)
    source = re.sub(r'#include "decode_.*|#pragma once', "", source)
    for pattern, replacement in _PTX:
        source = re.sub(pattern, replacement, source, flags=re.DOTALL)
    entries = "\n".join(
        f'extern "C" void run_{name}(int blocks, int threads, void** a) '
        f"{{ emulator::launch(blocks, threads, [=] {{ {name}(*({state}*)a[0], {arguments}); }}); }}"
        for name, arguments in _SIGNATURES[state].items()
    )
    (folder / "kernels.cpp").write_text(f'#include "cuda_on_cpu.hpp"\n{source}\n{entries}\n')
    # Each library has static variables of its own: no unique symbols across them.
    options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
    shape = [f"-DDIM={dim}", f"-DGROUP={group}", f"-DBFLOAT16={int(dtype == 'bfloat16')}"]
    subprocess.run(
        ["g++", *options, "-fno-gnu-unique", *shape, f"-I{Path(__file__).parent}", "-o", "kernels.so", "kernels.cpp"],
        cwd=folder, check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(folder / "kernels.so"))


def _run(kernels, name, blocks, threads, *structs):
    arguments = np.array([part.ctypes.data for part in structs], np.uint64)
    getattr(kernels, f"run_{name}")(blocks, threads, ctypes.c_void_p(arguments.ctypes.data))


class EmulatedKernels(DecodeKernels):
    """DecodeKernels over tensors of the CPU."""

    def __init__(self, geometry, buffers, work):
        self.geometry, self.buffers, self.work = geometry, buffers, work
        self._library = library(_DECODE, "State", geometry.dim, geometry.group, geometry.dtype)
        self._state = self._packed_state()

    def _launch(self, name, *more):
        _run(self._library, name, BLOCKS, decode_kernels._THREADS[name], self._state, *more)


class EmulatedAskKernels(AskKernels):
    """AskKernels over tensors of the CPU."""

    def _load(self, lay, device):
        dtype = {code: name for name, code in DTYPE_CODES.items()}[lay.dtype_code]
        self._library = library(("decode_common.cuh", "ask.cu"), "Asking", lay.dim, lay.group, dtype)

    def _launch(self, name, tokens):
        _run(self._library, name, 1 if name == "ask_workers" else BLOCKS, _THREADS[name], self._state, tokens)
