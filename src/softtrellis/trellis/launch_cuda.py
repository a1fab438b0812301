"""CUDA C++ kernels compiled at run time (NVRTC): no build step at install."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from importlib.resources import files
from operator import or_
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""As ``cuda/types.cuh`` numbers them."""

MAX_SHARED_BYTES = 227 * 1024
"""Dynamic shared memory of a block, at most."""

MOST_PREPARED = 1024
"""Launches that are kept prepared, by their shapes."""

_POINTER_BYTES = 8

CARVEOUT = 100
"""Of a multiprocessor's memory, the percentage that kernels that overlap ask for as shared memory.

It changes only on a multiprocessor that runs nothing: with what the driver chooses for each kernel,
blocks were seen to wait until those of the kernel before had ended, though there was room for both.
"""


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings returned; RuntimeError with the name of its error."""
    error, *rest = answer
    if int(error) != 0:
        raise RuntimeError(f"CUDA: {error!r}")
    return rest[0] if len(rest) == 1 else rest


@cache
def compile_source(source: str, major: int, minor: int) -> bytes:
    """Machine code of ``cuda/<source>`` for one compute capability.

    Raises:
        RuntimeError: it does not compile; with the compiler's messages.
    """
    from cuda.bindings import nvrtc

    folder = files("softtrellis.trellis") / "cuda"
    headers = [file for file in folder.iterdir() if file.name.endswith(".cuh")]
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            (folder / source).read_bytes(),
            source.encode(),
            len(headers),
            [header.read_bytes() for header in headers],
            [header.name.encode() for header in headers],
        )
    )
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"--std=c++17", b"-lineinfo"]
    answer = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(answer[0]) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{source} does not compile for sm_{major}{minor}:\n{log.decode()}")
    binary: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return binary


@cache
def _function(source: str, name: str, device: int, shared_bytes: int, overlap: bool) -> Any:
    from cuda.bindings import driver

    binary = compile_source(source, *torch.cuda.get_device_capability(device))
    module = _checked(driver.cuModuleLoadData(binary))
    function = _checked(driver.cuModuleGetFunction(module, name.encode()))
    attributes = driver.CUfunction_attribute
    wanted = {attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: shared_bytes}
    if overlap:
        wanted[attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT] = CARVEOUT
    for attribute, value in wanted.items():
        _checked(driver.cuFuncSetAttribute(function, attribute, value))
    return function


def _attributes(cluster: int, overlap: bool) -> list[Any]:
    """Of a launch, as the driver takes them."""
    from cuda.bindings import driver

    found, names = [], driver.CUlaunchAttributeID
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        sizes = attribute.value.clusterDim
        sizes.x, sizes.y, sizes.z = cluster, 1, 1
        found.append(attribute)
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        found.append(attribute)
    return found


def packed(numbers: Sequence[int]) -> bytes:
    """32-bit ints, filled up to whole pointers."""
    padded = [*numbers, *[0] * (len(numbers) % 2)]
    return struct.pack(f"{len(padded)}i", *padded)


def address(tensor: Tensor | None) -> int:
    """Of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class Kernel:
    """A kernel of ``cuda/<source>`` whose only parameter is structures of addresses and ints.

    Attributes:
        source: the file's name in the folder ``cuda`` beside this module.
        name: the kernel's name, declared ``extern "C"``.
        threads: threads of a block.
    """

    source: str
    name: str
    threads: int

    def __call__(
        self,
        blocks: int,
        shared_bytes: int,
        device: torch.device,
        addresses: Sequence[Tensor | None],
        numbers: Sequence[int],
    ) -> None:
        """One launch, see ``Prepared``; for kernels that run much longer than its preparation.

        Args:
            blocks, shared_bytes: as there.
            device: the tensors' device.
            addresses: contiguous tensors, or None, in the order of the structure's pointers.
            numbers: 32-bit ints, which follow the pointers.
        """
        launch = Prepared(self, blocks, shared_bytes, [(len(addresses), numbers)])
        launch(device.index, [[address(tensor) for tensor in addresses]])


class Prepared:
    """A launch of a kernel, all but its pointers and its stream: made once, started many times.

    What the driver takes of it is made once for each device and stream, and then only read, so that
    threads may share it. A stream's id in PyTorch stands for one handle of the driver's, whatever
    is captured.
    """

    def __init__(
        self,
        kernel: Kernel,
        blocks: int,
        shared_bytes: int,
        structures: Sequence[tuple[int, Sequence[int]]],
        *,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        """Takes all but the pointers.

        Args:
            kernel: what to start.
            blocks: blocks of the grid.
            shared_bytes: dynamic shared memory of a block.
            structures: of the parameter; the number of pointers of each, and the 32-bit ints that
                follow them.
            cluster: blocks of a cluster, a divisor of ``blocks``.
            overlap: start while the kernel before it ends (programmatic dependent launch); the
                kernel itself must wait before it touches memory that others write.
        """
        self._kernel, self._blocks, self._shared_bytes = kernel, blocks, shared_bytes
        self._cluster, self._overlap = cluster, overlap
        self._ints = [packed(numbers) for _, numbers in structures]
        fields = [
            f"{count}Q{len(ints)}s" for (count, _), ints in zip(structures, self._ints, strict=True)
        ]
        self._layout = struct.Struct("Q" + "".join(fields))
        self._buffer = ctypes.c_char * self._layout.size
        self._starts: dict[tuple[int, int], Callable[[int, int], tuple[Any, ...]]] = {}

    def __call__(self, device: int, pointers: Sequence[Sequence[int]]) -> None:
        """Starts it on PyTorch's current stream of a device; compiles it the first time.

        Args:
            device: index of the CUDA device.
            pointers: of each structure.
        """
        if torch.cuda.current_device() != device:
            with torch.cuda.device(device):
                self(device, pointers)
            return
        where = device, torch.accelerator.current_stream(device).stream_id
        start = self._starts.get(where)
        if start is None:
            start = self._starts[where] = self._configured(device)
        fields: list[int | bytes] = []
        for part, ints in zip(pointers, self._ints, strict=True):
            fields += (*part, ints)
        buffer = self._buffer()
        at = ctypes.addressof(buffer)
        # The driver reads addresses of parameters: of one, which follows its address in the buffer.
        self._layout.pack_into(buffer, 0, at + _POINTER_BYTES, *fields)
        _checked(start(at, 0))

    def _configured(self, device: int) -> Callable[[int, int], tuple[Any, ...]]:
        """The driver's launch, but for the addresses of the parameters and its "extra"."""
        from cuda.bindings import driver

        kernel, shared_bytes = self._kernel, self._shared_bytes
        stream = torch.cuda.current_stream(device)
        function = _function(kernel.source, kernel.name, device, shared_bytes, self._overlap)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self._blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, stream.cuda_stream
        config.attrs = _attributes(self._cluster, self._overlap)
        config.numAttrs = len(config.attrs)
        return partial(driver.cuLaunchKernelEx, config, function)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether each of these, where there are some, starts where 16 bytes can be read at once."""
    return reduce(or_, map(address, tensors), 0) % 16 == 0


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
