# mypy: allow-untyped-decorators
"""Viterbi on the CPU: one tile per thread at a time, vector loops over the overlaps."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softtrellis.spec import TrellisSpec
from softtrellis.trellis._numba_math import (
    LANES,
    larger,
    largest,
    load,
    splat,
    store,
    store_bytes,
    where_larger,
)
from softtrellis.trellis._overlaps_cpu import (
    Floats,
    Shape,
    as_array,
    end_message,
    entry,
    forward_code,
    from_lanes,
    inlined,
    over_threads,
    pins_or_free,
    shape_of,
    spread_rows,
)

_LEAST = np.float32(-3e38)


class _Problem(NamedTuple):
    """What is asked, in flat arrays, and the sizes."""

    w: Floats  # [B, N, V]
    pins: NDArray[np.int64]  # [B], -1 for free ends
    code: Floats  # forward_code
    components: tuple[int, ...]  # V zeros: their number is known to the compiler
    shape: Shape


@inlined
def _best_of_candidates(
    problem: _Problem, i: int, message: Floats, x: int, w0: Any, w1: Any
) -> Any:
    """The best score, minus the squared error, that leads to each lane, and its oldest symbol."""
    shape, V, code = problem.shape, len(problem.components), problem.code
    c = i * shape.R * V
    symbol = choice = splat(np.float32(0.0))
    best, one = splat(_LEAST), splat(np.float32(1.0))
    for _ in range(shape.R):
        d0 = load(code, c) - w0
        score = load(message, x) - d0 * d0
        if V == 2:
            d1 = load(code, c + LANES) - w1
            score = score - d1 * d1
        choice = where_larger(score, best, symbol, choice)
        best = larger(score, best)
        symbol = symbol + one
        c += V * LANES
        x += shape.period
    return best, choice


@entry
def _best_paths(first: int, stride: int, problem: _Problem, states: NDArray[np.int32]) -> None:
    shape, V, w, pins = problem.shape, len(problem.components), problem.w, problem.pins
    N, R, U, W = shape.N, shape.R, shape.U, shape.W
    message, lanes = np.empty(shape.width, np.float32), np.empty(shape.width, np.float32)
    spare, rows = np.empty(shape.width, np.float32), np.empty(R * shape.period, np.float32)
    choices = np.empty(N * shape.width, np.uint8)
    newest = min(R, U)
    for tile in range(first, pins.size, stride):
        end_message(message, shape, pins[tile])
        for step in range(N):
            at_w = (tile * N + step) * V
            w0, w1 = splat(w[at_w]), splat(w[at_w + V - 1])
            source = message
            if W < LANES:
                spread_rows(message, 0, rows, shape)
                source = rows
            top = splat(_LEAST)
            for i in range(0, shape.width, LANES):
                x = i & (shape.period - 1)
                best, choice = _best_of_candidates(problem, i, source, x, w0, w1)
                store(lanes, i, best)
                store_bytes(choices, step * shape.width + i, choice)
                top = larger(best, top)
            from_lanes(lanes, message, 0, spare, shape, largest(top))
        overlap = np.int64(np.argmax(message[:U])) if pins[tile] < 0 else pins[tile]
        for step in range(N - 1, -1, -1):
            lane = overlap % newest * W + overlap // newest
            state = np.int64(choices[step * shape.width + lane]) * U + overlap
            states[tile * N + step] = state
            overlap = state >> shape.shift


def best_path(w: Tensor, codebook: Tensor, spec: TrellisSpec, pins: Tensor | None) -> Tensor:
    """As ``viterbi_torch.best_path``, for float32 tensors on the CPU.

    Memory beyond inputs and outputs: N U bytes for every thread of ``torch.get_num_threads()``.

    Raises:
        ValueError: a tensor of another dtype or on another device.
    """
    states = torch.empty(w.shape[:2], dtype=torch.int32)
    problem = _Problem(
        as_array(w),
        pins_or_free(pins, w.shape[0]),
        as_array(forward_code(codebook, spec)),
        (0,) * spec.V,
        shape_of(spec, w.shape[1]),
    )
    paths = states.view(-1).numpy()
    over_threads(w.shape[0], lambda first, stride: _best_paths(first, stride, problem, paths))
    return states
