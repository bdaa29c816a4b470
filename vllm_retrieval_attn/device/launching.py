# SPDX-License-Identifier: Apache-2.0
"""CUDA sources of this folder, compiled by NVRTC, loaded and launched. NVRTC and cuda.bindings come with torch."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

_FOLDER = Path(__file__).parent


def failed(what: str, detail: Any) -> RuntimeError:
    """What to raise where CUDA refuses."""
    return RuntimeError(f"retrieval: {what}: {detail}")


def _called(what: str, result: Any) -> Any:
    """The value of a call of cuda.bindings; RuntimeError if it failed."""
    status, *values = result
    if int(status) != 0:
        raise failed(f"{what} failed", status)
    return values[0] if values else None


@cache
def compile_kernels(main: str, dim: int, group: int, dtype: str, arch: str) -> bytes:
    """Machine code of the kernels in the source ``main`` for one head size, group and element type; ``arch``: such as
    "sm_90".

    Raises:
        RuntimeError: NVRTC is missing or refuses.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as missing:
        raise failed("decode kernels need cuda-bindings, which torch for CUDA brings", missing) from None
    parts = sorted(_FOLDER.glob("decode_*.cuh"))
    source = (_FOLDER / main).read_bytes()
    headers = [part.read_bytes() for part in parts]
    names = [part.name.encode() for part in parts]
    try:
        program = _called(
            "nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(source, main.encode(), len(parts), headers, names)
        )
    except RuntimeError as missing:  # the library is loaded at the first call
        if str(missing).startswith("retrieval:"):
            raise
        raise failed("decode kernels need NVRTC, which comes with torch for CUDA", missing) from None
    options = [
        f"--gpu-architecture={arch}", "--std=c++17", f"-DDIM={dim}", f"-DGROUP={group}",
        f"-DBFLOAT16={int(dtype == 'bfloat16')}",
    ]  # fmt: skip
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status) != 0:
        log = b" " * _called("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise failed(f"decode kernels do not compile for {arch}", log.decode(errors="replace").strip("\0 \n"))
    code = b" " * _called("nvrtcGetCUBINSize", nvrtc.nvrtcGetCUBINSize(program))
    _called("nvrtcGetCUBIN", nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


class Kernels:
    """Kernels of one source, loaded on a device.

    Args:
        main, dim, group, dtype: see compile_kernels. threads: of a block of each kernel. device: a GPU.

    Attributes:
        multiprocessors: of the device. chains: whether a kernel may begin while the one ahead of it runs.
    """

    def __init__(
        self, main: str, dim: int, group: int, dtype: str, threads: Mapping[str, int], device: torch.device
    ) -> None:
        from cuda.bindings import driver

        properties = torch.cuda.get_device_properties(device)
        self.multiprocessors, self.chains = properties.multi_processor_count, properties.major >= 9
        code = compile_kernels(main, dim, group, dtype, f"sm_{properties.major}{properties.minor}")
        self._driver, self._threads = driver, threads
        torch.zeros(1, device=device)  # torch has made its context current
        module = self._called(driver.cuModuleLoadData(code))
        self._functions = {name: self._called(driver.cuModuleGetFunction(module, name.encode())) for name in threads}
        for function in self._functions.values():  # lazy loading takes the context's lock until the GPU drains
            self._called(driver.cuFuncLoad(function))
        self._configs: dict[str, Any] = {}

    @staticmethod
    def _called(result: Any) -> Any:
        return _called("a CUDA call of the decode kernels", result)

    def resident(self, name: str) -> int:
        """Blocks of a kernel that the device runs at once."""
        count = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor
        blocks: int = self._called(count(self._functions[name], self._threads[name], 0))
        return max(blocks, 1) * self.multiprocessors

    def set_grid(self, name: str, blocks: int, chained: bool = False) -> None:
        """How many blocks a kernel is launched with. ``chained``: it may begin early, see ``chains``."""
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads[name], 1, 1
        if chained:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        self._configs[name] = config

    def launch(self, name: str, *structs: np.ndarray[Any, Any]) -> None:
        """Launch a kernel with these arguments on torch's current stream."""
        arguments = np.array([part.ctypes.data for part in structs], np.uint64)
        config = self._configs[name]
        config.hStream = torch.cuda.current_stream().cuda_stream
        self._called(self._driver.cuLaunchKernelEx(config, self._functions[name], arguments.ctypes.data, 0))


def packed(*values: torch.Tensor | int | float) -> np.ndarray[Any, Any]:
    """A kernel's struct whose fields all have eight bytes; tensors become addresses."""
    found = np.empty(len(values), np.int64)
    for i, value in enumerate(values):
        if isinstance(value, float):
            found[i] = np.float64(value).view(np.int64)
        else:
            found[i] = value.data_ptr() if isinstance(value, torch.Tensor) else value
    return found
