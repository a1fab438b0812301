# mypy: allow-untyped-decorators
"""The nearest path beside a given one, on the CPU: one tile per thread at a time."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softtrellis.spec import TrellisSpec
from softtrellis.trellis._overlaps_cpu import (
    UNREACHABLE,
    Floats,
    Shape,
    as_array,
    entry,
    over_threads,
    shape_of,
)


@entry
def _nearest_detours(
    first: int,
    step: int,
    states: NDArray[np.int64],
    code: Floats,
    credit: Floats,
    shape: Shape,
    score: Floats,
    length: Floats,
) -> None:
    N, R, U = shape.N, shape.R, shape.U
    V = code.size // (R * U)
    gain, far = np.empty(R * U, np.float32), np.empty(R * U, np.float32)
    left, way = np.empty(U, np.float32), np.empty(U, np.float32)
    left_next, way_next = np.empty(U, np.float32), np.empty(U, np.float32)
    for tile in range(first, score.size, step):
        left[:], way[:] = UNREACHABLE, 0.0
        twice = np.float32(2.0) * credit[tile]
        for t in range(N):
            own = states[tile * N + t]
            c0, c1 = code[own * V], code[own * V + V - 1]
            for s in range(R * U):
                d0, d1 = code[s * V] - c0, code[s * V + V - 1] - c1
                squared, distance = d0 * d0, abs(d0)
                if V == 2:
                    squared += d1 * d1
                    distance += abs(d1)
                gain[s], far[s] = twice * distance - squared, distance
            for v in range(U):
                left_next[v] = left[v >> shape.shift] + gain[v]
                way_next[v] = way[v >> shape.shift] + far[v]
            for a in range(1, R):
                for v in range(U):
                    s = a * U + v
                    best = left[s >> shape.shift] + gain[s]
                    longer = way[s >> shape.shift] + far[s]
                    better = best > left_next[v]
                    left_next[v] = best if better else left_next[v]
                    way_next[v] = longer if better else way_next[v]
            for symbol in range(R):
                s = (own >> shape.shift) * R + symbol
                v = s % U
                if s != own and gain[s] > left_next[v]:
                    left_next[v], way_next[v] = gain[s], far[s]
            left, left_next = left_next, left
            way, way_next = way_next, way
        end = states[tile * N + N - 1] % U
        score[tile], length[tile] = left[end], way[end]


def nearest_detour(
    states: Tensor, codebook: Tensor, spec: TrellisSpec, credit: Tensor
) -> tuple[Tensor, Tensor]:
    """2 credit |D|_1 - |D|_2^2 and |D|_1, float32 [B], as in ``detours.nearest_detour``.

    Raises:
        ValueError: a tensor of another dtype or on another device.
    """
    score, length = torch.empty_like(credit), torch.empty_like(credit)
    problem = (
        states.to(torch.int64).contiguous().view(-1).numpy(),
        as_array(codebook),
        as_array(credit),
        shape_of(spec, states.shape[1]),
        as_array(score),
        as_array(length),
    )
    over_threads(states.shape[0], lambda first, stride: _nearest_detours(first, stride, *problem))
    return score, length
