"""Viterbi in CUDA C++ for k = 2 at L = 16: ``cuda/viterbi_hyb.cu`` and ``cuda/viterbi_scalar.cu``.

Other trellises, V = 2 codebooks without HYB's symmetries and V = 1 codebooks that are not float16
numbers times a factor go to ``viterbi_triton``.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from softtrellis.spec import TrellisSpec
from softtrellis.trellis import viterbi_triton
from softtrellis.trellis.bcjr_cuda import HYB_SPEC, SCALAR_SPEC
from softtrellis.trellis.codebook_cuda import scaled_halves
from softtrellis.trellis.launch_cuda import Kernel, multiprocessors
from softtrellis.trellis.tail_biting import two_passes

MOST_STEPS = 1024
"""What shared memory holds."""

_FREE, _PINNED, _TAIL_BITING = range(3)
_MANY, _FEW = (
    Kernel("viterbi_hyb.cu", "viterbi_many", 512),
    Kernel("viterbi_hyb.cu", "viterbi_few", 1024),
)
_SCALAR = Kernel("viterbi_scalar.cu", "viterbi", 512)

_known_to_fit: MutableMapping[Tensor, tuple[int, bool]] = WeakTensorKeyDictionary()
"""By codebook: its version, and whether the CUDA kernels take that; learned at first use."""


def _runs(spec: TrellisSpec, steps: int, *, tail_biting: bool) -> bool:
    """Whether there is a CUDA kernel for this trellis."""
    window = 8 if tail_biting else 4
    fits = spec == HYB_SPEC or (spec == SCALAR_SPEC and steps % window == 0)
    return steps <= MOST_STEPS and fits


def _start(
    w: Tensor, codebook: Tensor, spec: TrellisSpec, pins: Tensor | None, ends: int
) -> Tensor:
    """States int32 [B, N]; the Triton kernels fill them where these have to leave it to them."""
    fits = _fits(codebook)
    if fits is False:
        return _triton(w, codebook, spec, pins, ends)
    batch, steps, _ = w.shape
    device, processors = w.device, multiprocessors(w.device)
    states = torch.empty(batch, steps, dtype=torch.int32, device=device)
    following, left = torch.zeros(2, dtype=torch.int32, device=device)
    if spec == HYB_SPEC:
        groups = 1 if batch <= processors else 2
        blocks = min(processors, -(-batch // groups))
        kernel, tables = _FEW if groups == 1 else _MANY, [codebook]
        rows = -(-steps // 2)
        group = 2 * spec.num_overlaps * 4 + 384 + steps * 8
        shared = spec.num_states // 4 * 8 + groups * group
    else:
        groups, blocks = 1, min(processors, batch)
        kernel, tables = _SCALAR, list(scaled_halves(codebook))
        rows = steps // 4
        shared = spec.num_overlaps * 4 + 2 * 64 + 16 + steps * 4 + spec.num_states * 2
    floats = blocks * groups * rows * spec.num_overlaps
    scratch = torch.empty(floats, dtype=torch.float32, device=device)
    addresses = [w, *tables, pins, states, scratch, following, left]
    kernel(blocks, shared, device, addresses, [ends, batch, steps])
    del scratch
    if fits is None and _can_remember(codebook):
        fits = not bool(left)
        _known_to_fit[codebook] = (codebook._version, fits)
    if fits:
        return states
    if ends == _TAIL_BITING:
        two_passes(
            w, spec, lambda x, seam: viterbi_triton.fill(x, codebook, spec, seam, states, left)
        )
    else:
        viterbi_triton.fill(w, codebook, spec, pins, states, left)
    return states


def _fits(codebook: Tensor) -> bool | None:
    """Whether the CUDA kernels took this codebook before; None if that is not known."""
    if not _can_remember(codebook):
        return None
    version, fits = _known_to_fit.get(codebook, (-1, False))
    return fits if version == codebook._version else None


def _can_remember(codebook: Tensor) -> bool:
    """Not while a graph is captured, whose codebook may change before it is replayed."""
    return not (codebook.is_inference() or torch.cuda.is_current_stream_capturing())


def _triton(
    w: Tensor, codebook: Tensor, spec: TrellisSpec, pins: Tensor | None, ends: int
) -> Tensor:
    if ends != _TAIL_BITING:
        return viterbi_triton.best_path(w, codebook, spec, pins)
    return two_passes(w, spec, lambda x, seam: viterbi_triton.best_path(x, codebook, spec, seam))


def best_path(w: Tensor, codebook: Tensor, spec: TrellisSpec, pins: Tensor | None) -> Tensor:
    """The path of least squared error; ``viterbi_torch.best_path`` on an NVIDIA GPU.

    Args:
        w: float32 [B, N, V].
        codebook: float32 [S, V].
        spec: the trellis.
        pins: int64 [B], the overlap at both ends, or None for free ends.

    Returns:
        int32 [B, N], the states.
    """
    if w.shape[0] == 0 or not _runs(spec, w.shape[1], tail_biting=False):
        return viterbi_triton.best_path(w, codebook, spec, pins)
    return _start(w, codebook, spec, pins, _FREE if pins is None else _PINNED)


def tail_biting_path(w: Tensor, codebook: Tensor, spec: TrellisSpec) -> Tensor:
    """Both passes of QTIP's tail-biting Viterbi (algorithm 4) in one kernel.

    Args:
        w: float32 [B, N, V].
        codebook: float32 [S, V].
        spec: the trellis.

    Returns:
        int32 [B, N], the states.
    """
    if w.shape[0] == 0 or not _runs(spec, w.shape[1], tail_biting=True):
        return _triton(w, codebook, spec, None, _TAIL_BITING)
    return _start(w, codebook, spec, None, _TAIL_BITING)
