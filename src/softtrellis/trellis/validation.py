"""What ``viterbi`` and ``bcjr`` check of their arguments."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from softtrellis.spec import TrellisSpec

Ends = Literal["free", "tail_biting", "tail_biting_exact"] | Tensor

EXACT_OVERLAPS = 256
"""Most overlaps for which the exact tail-biting answer is computed, one run per overlap."""


def values_are_readable(tensor: Tensor) -> bool:
    """Whether a check may look at values: not while tracing, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_problem(w: Tensor, codebook: Tensor, spec: TrellisSpec, *, values: bool = True) -> None:
    """ValueError unless w is float [B, N, V], finite, and the codebook is float [S, V].

    Whether w is finite is checked where ``values_are_readable``, unless ``values`` is False.
    """
    if w.ndim != 3 or w.shape[2] != spec.V or w.shape[1] < 1:
        raise ValueError(f"w must be [B, N, V={spec.V}] with N >= 1, got {list(w.shape)}")
    if w.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"w must be float32 or float64, got {w.dtype}; convert it with .float()")
    if tuple(codebook.shape) != (spec.num_states, spec.V):
        raise ValueError(
            f"codebook must be [{spec.num_states}, {spec.V}] for {spec}, got {list(codebook.shape)}"
        )
    if not codebook.dtype.is_floating_point:
        raise ValueError(f"codebook must be a floating point tensor, got {codebook.dtype}")
    if codebook.device != w.device:
        raise ValueError(f"w is on {w.device} and codebook on {codebook.device}; move one of them")
    if values and values_are_readable(w) and not bool(torch.isfinite(w).all()):
        raise ValueError("w holds NaN or infinity")


def resolve_pins(ends: Ends, w: Tensor, spec: TrellisSpec, *, values: bool = True) -> Tensor | None:
    """int64 [B] where ``ends`` is a tensor of overlaps, else None; ValueError if no path exists.

    The overlaps' range is checked where ``values_are_readable``, unless ``values`` is False.
    """
    if isinstance(ends, str) and ends not in ("free", "tail_biting", "tail_biting_exact"):
        raise ValueError(
            f"unknown ends {ends!r}; use 'free', 'tail_biting', 'tail_biting_exact' "
            "or an int tensor [B] of overlaps"
        )
    closed = not (isinstance(ends, str) and ends == "free")
    if closed and w.shape[1] < spec.min_closed_steps:
        raise ValueError(
            f"no path closes in {w.shape[1]} steps: {spec} needs at least "
            f"{spec.min_closed_steps}; use ends='free' or longer tiles"
        )
    if isinstance(ends, str):
        return None
    if not isinstance(ends, Tensor) or ends.dtype.is_floating_point or ends.dtype == torch.bool:
        raise ValueError("ends must be a string or an int tensor [B] of overlaps")
    if tuple(ends.shape) != (w.shape[0],):
        raise ValueError(f"ends must be [B={w.shape[0]}], got {list(ends.shape)}")
    if values and ends.numel() and values_are_readable(ends):
        least, most = torch.stack(ends.aminmax()).tolist()
        if not 0 <= least <= most < spec.num_overlaps:
            raise ValueError(f"overlaps to pin must lie in [0, {spec.num_overlaps})")
    return ends.to(device=w.device, dtype=torch.int64)
