"""Which implementation runs: an argument of every public function, never a hidden switch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "cpu", "triton"]
ResolvedBackend = Literal["torch", "cpu", "triton"]


def resolve_backend(backend: Backend, tensor: Tensor) -> ResolvedBackend:
    """Chooses the implementation for a tensor, or says why the one asked for cannot run.

    ``"auto"`` is ``"triton"`` for float32 CUDA tensors, ``"cpu"`` (Numba) for float32 tensors on
    the CPU and ``"torch"`` for everything else.

    Raises:
        ValueError: an unknown name, or a backend that does not take this device or dtype.
        RuntimeError: a backend whose package is not installed.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; use one of {', '.join(get_args(Backend))}")
    if backend == "auto":
        if tensor.device.type == "cuda" and tensor.dtype == torch.float32:
            backend = "triton"
        elif tensor.device.type == "cpu" and tensor.dtype == torch.float32:
            backend = "cpu"
        else:
            backend = "torch"
    if backend == "cpu":
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            raise ValueError(
                "backend 'cpu' takes float32 tensors on the CPU, got "
                f"{tensor.dtype} on {tensor.device}; convert them or use backend='torch'"
            )
        if find_spec("numba") is None:
            raise RuntimeError("backend 'cpu' needs numba: pip install numba")
    if backend == "triton":
        if tensor.device.type != "cuda" or tensor.dtype != torch.float32:
            raise ValueError(
                "backend 'triton' takes float32 tensors on a CUDA device, got "
                f"{tensor.dtype} on {tensor.device}; use backend='torch', or 'auto'"
            )
        if find_spec("triton") is None:
            raise RuntimeError("backend 'triton' needs triton: pip install 'softtrellis[triton]'")
    return backend
