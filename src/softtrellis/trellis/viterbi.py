"""Hard trellis quantization: the best path by the Viterbi algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from softtrellis.backend import Backend, resolve_backend
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bitshift import overlap_in
from softtrellis.trellis.validation import EXACT_OVERLAPS, Ends, check_problem, resolve_pins


@dataclass(frozen=True, eq=False)
class Path:
    """A path for each tile.

    Attributes:
        states: int32 [B, N].
        values: [B, N, V], ``codebook[states]``, in the dtype of the weights.
        cost: [B], the squared error summed over the tile.
    """

    states: Tensor
    values: Tensor
    cost: Tensor


class BestPath(Protocol):
    """What a backend implements: see ``viterbi_torch.best_path``."""

    def __call__(
        self, w: Tensor, codebook: Tensor, spec: TrellisSpec, pins: Tensor | None
    ) -> Tensor: ...


def _implementation(backend: Backend, w: Tensor) -> BestPath:
    resolved = resolve_backend(backend, w)
    if resolved == "cpu":
        from softtrellis.trellis.viterbi_cpu import best_path as cpu

        return cpu
    if resolved == "triton":
        from softtrellis.trellis.viterbi_triton import best_path as triton

        return triton
    from softtrellis.trellis.viterbi_torch import best_path as reference

    return reference


def viterbi(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    *,
    ends: Ends = "tail_biting",
    backend: Backend = "auto",
) -> Path:
    """The path through the trellis of least squared error (QTIP, section 3.1 and algorithm 4).

    Args:
        w: float32 or float64 [B, N, V], the weights of B tiles.
        codebook: float [2**L, V].
        spec: the trellis.
        ends: "tail_biting" is QTIP's two passes: the tile rolled by half, then the tile with both
            ends pinned to the overlap found at the seam. "tail_biting_exact" tries every overlap
            and needs at most 256. "free" does not close the path. An int tensor [B] of overlaps
            in [0, U) pins both ends of each tile.
        backend: "auto", "torch", "cpu" or "triton"; see ``resolve_backend``.

    Returns:
        Path, detached from the autograd graph.

    Raises:
        ValueError: shapes or values that do not fit, or ends for which no path exists.
        RuntimeError: a backend that is not installed.
    """
    check_problem(w, codebook, spec)
    pins = resolve_pins(ends, w, spec)
    best_path = _implementation(backend, w)
    w = w.detach()
    table = codebook.detach().to(w)

    if isinstance(ends, str) and ends == "tail_biting_exact":
        states = _exact_tail_biting(w, table, spec, best_path)
    elif isinstance(ends, str) and ends == "tail_biting":
        half = w.shape[1] // 2
        rolled = best_path(w.roll(-half, dims=1), table, spec, None)
        seam = overlap_in(rolled[:, -half if half else 0], spec).to(torch.int64)
        states = best_path(w, table, spec, seam)
    else:
        states = best_path(w, table, spec, pins)
    values = table[states.to(torch.int64)]
    cost = (values.double() - w.double()).square().sum((1, 2)).to(w.dtype)
    return Path(states, values, cost)


def _exact_tail_biting(
    w: Tensor, codebook: Tensor, spec: TrellisSpec, best_path: BestPath
) -> Tensor:
    batch, steps, _ = w.shape
    if spec.num_overlaps > EXACT_OVERLAPS:
        raise ValueError(
            f"ends='tail_biting_exact' tries every overlap and takes at most {EXACT_OVERLAPS}, "
            f"this trellis has {spec.num_overlaps}; use ends='tail_biting'"
        )
    least = w.new_full((batch,), torch.inf)
    states = torch.zeros(batch, steps, dtype=torch.int32, device=w.device)
    for overlap in range(spec.num_overlaps):
        pins = torch.full((batch,), overlap, dtype=torch.int64, device=w.device)
        candidate = best_path(w, codebook, spec, pins)
        cost = (codebook[candidate.to(torch.int64)] - w).square().sum((1, 2))
        better = cost < least
        least = torch.where(better, cost, least)
        states = torch.where(better.unsqueeze(1), candidate, states)
    return states
