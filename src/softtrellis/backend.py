"""Which implementation runs: an argument of every public function, never a hidden switch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from softtrellis.extras import install

Backend = Literal["auto", "torch", "cpu", "triton", "cuda"]
ResolvedBackend = Literal["torch", "cpu", "triton", "cuda"]
ComputeType = Literal["auto", "bfloat16", "float32"]

CUDA_CAPABILITIES = ((9, 0), (10, 0), (10, 3))
"""Compute capabilities with the 227 KiB of shared memory a block that the CUDA kernels need."""


def check_device(device: str) -> None:
    """ValueError unless it is "cpu" or a CUDA device that is there."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError("device must be cpu: torch finds no CUDA device here")


def compute_dtype(dtype: ComputeType, device: str) -> torch.dtype:
    """What matrix products are computed in: "auto" is bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ValueError: an unknown name.
    """
    if dtype not in get_args(ComputeType):
        raise ValueError(f"unknown dtype {dtype!r}; use one of {', '.join(get_args(ComputeType))}")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def resolve_backend(backend: Backend, tensor: Tensor) -> ResolvedBackend:
    """Chooses the implementation for a tensor, or says why the one asked for cannot run.

    ``"auto"`` is ``"cpu"`` (Numba) for float32 tensors on the CPU and ``"torch"`` for float64. For
    float32 tensors on a GPU it is ``"cuda"`` where that can run and ``"triton"`` elsewhere.
    ``"cuda"`` is CUDA C++ for L = 16 and k = 2, BCJR also for HYB at L = 12, and Triton for what
    that leaves.

    Raises:
        ValueError: an unknown name, or a backend that does not take this device or dtype.
        RuntimeError: a backend whose package is not installed.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; use one of {', '.join(get_args(Backend))}")
    if backend == "auto":
        if tensor.dtype != torch.float32 or tensor.device.type not in ("cpu", "cuda"):
            return "torch"
        if tensor.device.type == "cpu":
            backend = "cpu"
        else:
            backend = "triton" if why_no_cuda(tensor.device) else "cuda"
    if backend == "cpu":
        _check_float32(backend, tensor, "cpu", "on the CPU; convert them or use backend='torch'")
        if find_spec("numba") is None:
            raise RuntimeError("backend 'cpu' needs numba: pip install numba")
    if backend in ("triton", "cuda"):
        _check_float32(backend, tensor, "cuda", "on a CUDA device; use backend='torch', or 'auto'")
        if find_spec("triton") is None:
            raise RuntimeError(f"backend {backend!r} needs triton; {install(backend)}")
    if backend == "cuda" and (reason := why_no_cuda(tensor.device)):
        raise RuntimeError(f"backend 'cuda' {reason}")
    return backend


def _check_float32(backend: str, tensor: Tensor, device: str, rest: str) -> None:
    if tensor.device.type != device or tensor.dtype != torch.float32:
        where, advice = rest.split(";", 1)
        raise ValueError(
            f"backend {backend!r} takes float32 tensors {where}, got "
            f"{tensor.dtype} on {tensor.device};{advice}"
        )


def why_no_cuda(device: torch.device) -> str | None:
    """What is missing for the backend "cuda" on a CUDA device; None if nothing is."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return f"needs cuda-bindings; {install('cuda')}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU; use backend='triton'"
    if torch.cuda.get_device_capability(device) not in CUDA_CAPABILITIES:
        name = torch.cuda.get_device_name(device)
        return (
            "is made for compute capability 9.0 and 10.x (H100, H200, B200), which have 227 KiB of "
            f"shared memory a block; this is {name}; use backend='triton'"
        )
    return None
