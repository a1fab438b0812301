"""CUDA C++ kernels compiled at run time (NVRTC): no build step at install."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""As ``cuda/types.cuh`` numbers them."""

MAX_SHARED_BYTES = 227 * 1024
"""Dynamic shared memory of a block, at most."""

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


def _packed(addresses: Sequence[Tensor | None], numbers: Sequence[int]) -> bytes:
    """Pointers, then ints, filled up to whole pointers."""
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in addresses]
    padded = [*numbers, *[0] * (len(numbers) % 2)]
    return struct.pack(f"{len(pointers)}Q{len(padded)}i", *pointers, *padded)


@dataclass(frozen=True)
class Kernel:
    """A kernel of ``cuda/<source>`` whose only parameter is a structure of addresses and ints.

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
        *,
        more: Sequence[tuple[Sequence[Tensor | None], Sequence[int]]] = (),
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        """Starts it on PyTorch's current stream; compiles it the first time.

        Args:
            blocks: blocks of the grid.
            shared_bytes: dynamic shared memory of a block.
            device: the CUDA device.
            addresses: contiguous tensors, or None, in the order of the structure's pointers.
            numbers: 32-bit ints, which follow the pointers.
            more: pointers and ints of further such structures, where the parameter is an array.
            cluster: blocks of a cluster, a divisor of ``blocks``.
            overlap: start while the kernel before it ends (programmatic dependent launch); the
                kernel itself must wait before it touches memory that others write.
        """
        from cuda.bindings import driver

        packed = b"".join(_packed(*part) for part in ((addresses, numbers), *more))
        structure = ctypes.create_string_buffer(packed, len(packed))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(structure))
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            function = _function(self.source, self.name, stream.device_index, shared_bytes, overlap)
            config = driver.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
            config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
            config.sharedMemBytes, config.hStream = shared_bytes, stream.cuda_stream
            config.attrs = _attributes(cluster, overlap)
            config.numAttrs = len(config.attrs)
            _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(parameters), 0))


def aligned(*tensors: Tensor | None) -> bool:
    """Whether each of these, where there are some, starts where 16 bytes can be read at once."""
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
