"""The best path beside a given one: list Viterbi with a list of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bitshift import check_path, overlap_in, overlap_out
from softtrellis.trellis.reference import (
    IMPOSSIBLE,
    CarryingMaxSemiring,
    Element,
    Weights,
    by_overlap_in,
)

DetourBackend = Literal["auto", "torch", "cpu"]

_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Detour:
    """How far another path's codewords are from those of a given path, for each tile.

    Attributes:
        squared: [B], the squared distance |D|_2^2; infinite where there is no other path.
        length: [B], the sum of absolute differences |D|_1.
    """

    squared: Tensor
    length: Tensor


def nearest_detour(
    states: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    *,
    credit: Tensor | None = None,
    backend: DetourBackend = "auto",
) -> Detour:
    """The other path with the same ends of least |D|_2^2 - 2 credit |D|_1, see ``best_detour``.

    Args:
        states: int [B, N], a path for each tile.
        codebook: float [S, V].
        spec: the trellis.
        credit: float [B], at least 0; None is 0, for the path that is nearest.
        backend: "torch" is the reference; "cpu" (Numba) takes float32 on the CPU; "auto" is "cpu"
            where that can run, and "torch" elsewhere.

    Returns:
        Detour, in the codebook's dtype.

    Raises:
        ValueError: states that are not paths, or a backend that is unknown or cannot run.
    """
    check_path(states, spec)
    if backend not in get_args(DetourBackend):
        raise ValueError(f"unknown backend {backend!r}; use one of 'auto', 'torch', 'cpu'")
    if credit is None:
        credit = codebook.new_zeros(states.shape[0])
    fits = codebook.dtype == torch.float32 and codebook.device.type == "cpu"
    if backend == "cpu" or (backend == "auto" and fits):
        from softtrellis.trellis import detours_cpu

        score, length = detours_cpu.nearest_detour(states, codebook, spec, credit)
    else:
        chunk = max(1, _CHUNK_ELEMENTS // (spec.num_states * spec.V))
        pieces = zip(states.split(chunk), credit.split(chunk), strict=True)
        parts = [_nearest(tiles, codebook, spec, part) for tiles, part in pieces]
        score, length = (torch.cat(x) for x in zip(*parts, strict=True))
    squared = (2.0 * credit * length - score).clamp_min(0.0)
    return Detour(torch.where(score < IMPOSSIBLE / 2, torch.inf, squared), length)


def _nearest(states: Tensor, codebook: Tensor, spec: TrellisSpec, credit: Tensor) -> Element:
    own = codebook[states.to(torch.int64)]

    def weights(t: int) -> Element:
        apart = (codebook - own[:, t, None]).abs()
        length = apart.sum(-1)
        return 2.0 * credit[:, None] * length - apart.square().sum(-1), length

    return best_detour(states, weights, spec)


def best_detour(states: Tensor, weights: Weights, spec: TrellisSpec) -> Element:
    """The path of largest weight among those that differ from a given one and have its ends.

    Viterbi's recursion for two kinds of paths: the given one, and those that have left it (Seshadri
    and Sundberg, IEEE Transactions on Communications, 1994, for longer lists).

    Args:
        states: int [B, N], a path for each tile.
        weights: of a step, as (log weight [B, S], an additive quantity [B, S]).
        spec: the trellis.

    Returns:
        (log weight [B], the quantity summed along that path [B]); the log weight is below
        ``IMPOSSIBLE / 2`` where no other path has these ends.
    """
    semiring, path = CarryingMaxSemiring(), states.to(torch.int64)
    symbols = torch.arange(spec.num_branches, device=path.device)
    given: Element | None = None
    left: Element | None = None
    for t in range(path.shape[1]):
        here, own = weights(t), path[:, t, None]
        if given is None or left is None:
            given = tuple(part.new_zeros(part.shape[0], 1) for part in here)
            free = tuple(part.new_zeros(part.shape[0], spec.num_overlaps) for part in here)
            left = (free[0] + IMPOSSIBLE, free[1])
        branches = overlap_in(own, spec) * spec.num_branches + symbols
        leave = semiring.times(given, tuple(part.gather(1, branches) for part in here))
        leave[0][branches == own] = IMPOSSIBLE
        every = semiring.times(by_overlap_in(left, spec), here)
        stay = tuple(part.gather(1, branches) for part in every)
        both = tuple(torch.stack(pair) for pair in zip(stay, leave, strict=True))
        best = semiring.sum(both, 0)
        for part, value in zip(every, best, strict=True):
            part.scatter_(1, branches, value)
        shape = (-1, spec.num_branches, spec.num_overlaps)
        left = semiring.sum(tuple(part.reshape(shape) for part in every), 1)
        given = semiring.times(given, tuple(part.gather(1, own) for part in here))
    assert left is not None
    end = overlap_out(path[:, -1:], spec)
    return tuple(part.gather(1, end).squeeze(1) for part in left)
