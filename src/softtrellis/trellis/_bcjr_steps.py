# mypy: allow-untyped-decorators
"""What the sweeps of ``bcjr_cpu`` do with one chunk of lanes: see there."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softtrellis.trellis._numba_math import (
    LANES,
    exp2,
    exp2_above,
    larger,
    load,
    log2,
    nearest,
    smaller,
    splat,
    store,
    total,
)
from softtrellis.trellis._overlaps_cpu import Floats, Shape, inlined, kernel

Doubles = NDArray[np.float64]

ZERO = np.float32(0.0)
LEAST = np.float32(-3e38)
FLOOR = np.float32(-125.0)  # the smallest weight, 2**floor, is a normal number
_CEILING = np.float32(64.0)
_DEEPEST = np.float32(-(2.0**21))  # messages this far below the best are all the same
LN2 = math.log(2.0)


class Problem(NamedTuple):
    """What is asked, in flat arrays, and the sizes."""

    w: Floats  # [B, N, V]
    kappa: Floats  # [B], 1 / (T ln 2)
    pins: NDArray[np.int64]  # [B], -1 for free ends
    ahead: Floats  # forward_code
    back: Floats  # backward_code
    box: Floats  # [2, 2], smallest and largest value of either component
    components: tuple[int, ...]  # V zeros: their number is known to the compiler
    shape: Shape


class Upstream(NamedTuple):
    """What the backward pass is given besides, in flat arrays."""

    g: Floats  # [B, N, V], gradient of the values
    soft: Floats  # [B, N, V], the values
    g_log_z: Floats  # [B]


class CodeGradient(NamedTuple):
    """Gradients of the codebook, in the order of ``backward_code``."""

    tile: Floats  # of the current tile
    total: Doubles  # of the tiles of one thread


class Scratch(NamedTuple):
    """Buffers of one thread. The first six hold one entry per lane of a chunk."""

    t: Floats  # candidates, then weights [chunk, R, LANES]
    peaks: Floats  # m, a whole number
    sums: Floats
    sums0: Floats
    sums1: Floats
    logs: Floats
    lanes: Floats  # one message in the order of the lanes [width]
    tangent_lanes: Floats
    spare: Floats
    rows: Floats  # one message in rows for the loop over candidates [R, period]
    tangent_rows: Floats


@kernel
def new_scratch(shape: Shape) -> Scratch:
    chunk, rows = shape.chunk * LANES, shape.R * shape.period
    return Scratch(
        np.empty(shape.R * chunk, np.float32),
        np.empty(chunk, np.float32),
        np.empty(chunk, np.float32),
        np.empty(chunk, np.float32),
        np.empty(chunk, np.float32),
        np.empty(chunk, np.float32),
        np.empty(shape.width, np.float32),
        np.empty(shape.width, np.float32),
        np.empty(shape.width, np.float32),
        np.empty(rows, np.float32),
        np.empty(rows, np.float32),
    )


@inlined
def aim_of_step(
    problem: Problem, at: int
) -> tuple[np.float32, np.float32, np.float32, np.float32, float]:
    """A step's weight, clipped to the codebook's box; how it pulls; what the clipping took off.

    |C - w|^2 = d (d + pull) + offset with d = C - clipped, pull = 2 (clipped - w): for an outlier
    the sum is large and the same for all states, and would cost the differences their digits.
    """
    V = len(problem.components)
    w0, w1 = problem.w[at], problem.w[at + V - 1]
    clipped0 = min(max(w0, problem.box[0]), problem.box[1])
    clipped1 = min(max(w1, problem.box[2]), problem.box[3])
    offset = np.float64(clipped0 - w0) ** 2
    if V == 2:
        offset += np.float64(clipped1 - w1) ** 2
    two = np.float32(2.0)
    return clipped0, clipped1, two * (clipped0 - w0), two * (clipped1 - w1), offset


@inlined
def candidates_of_lanes(
    code: Floats, c: int, message: Floats, x: int, aim: Any, pulls: Any, kappa: Any, t: Floats,
    at: int, V: int, shape: Shape,
) -> Any:  # fmt: skip
    w0, w1 = splat(aim[0]), splat(aim[1])
    m = splat(LEAST)
    for _ in range(shape.R):
        d0 = load(code, c) - w0
        energy = d0 * d0 if pulls is None else d0 * (d0 + pulls[0])
        if V == 2:
            d1 = load(code, c + LANES) - w1
            energy = (d1 * d1 if pulls is None else d1 * (d1 + pulls[1])) + energy
        score = load(message, x) - kappa * energy
        store(t, at, score)
        m = larger(score, m)
        c += V * LANES
        x += shape.period
        at += LANES
    return m


@inlined
def candidates(
    code: Floats, i0: int, message: Floats, row: int, aim: Any, kappa: np.float32,
    problem: Problem, scratch: Scratch,
) -> None:  # fmt: skip
    """t_r and the rounded peak m of a chunk of lanes."""
    shape, V, t = problem.shape, len(problem.components), scratch.t
    scale = splat(kappa)
    inside = aim[2] == ZERO and aim[3] == ZERO
    for b in range(shape.chunk):
        i, at = i0 + b * LANES, b * shape.R * LANES
        x, c = row + (i & (shape.period - 1)), i * shape.R * V
        if inside:
            m = candidates_of_lanes(code, c, message, x, aim, None, scale, t, at, V, shape)
        else:
            pulls = (splat(aim[2]), splat(aim[3]))
            m = candidates_of_lanes(code, c, message, x, aim, pulls, scale, t, at, V, shape)
        store(scratch.peaks, b * LANES, nearest(larger(m, splat(_DEEPEST))))


@inlined
def weights(shape: Shape, scratch: Scratch) -> None:
    """t_r becomes 2**(t_r - m), but at least 2**-125."""
    at = 0
    for b in range(shape.chunk):
        m = load(scratch.peaks, b * LANES)
        least = m + splat(FLOOR)
        for _ in range(shape.R):
            store(scratch.t, at, exp2_above(larger(load(scratch.t, at), least), m))
            at += LANES


@inlined
def total_weights(shape: Shape, scratch: Scratch) -> None:
    """The sum over r of ``weights``, where only that is wanted."""
    at = 0
    for b in range(shape.chunk):
        m, s = load(scratch.peaks, b * LANES), splat(ZERO)
        least = m + splat(FLOOR)
        for _ in range(shape.R):
            s = s + exp2_above(larger(load(scratch.t, at), least), m)
            at += LANES
        store(scratch.sums, b * LANES, s)


@inlined
def sum_of_rows(t: Floats, at: int, R: int) -> Any:
    s = splat(ZERO)
    for _ in range(R):
        s = s + load(t, at)
        at += LANES
    return s


@inlined
def gain_of(d0: Any, d1: Any, V: int, g0: Any, g1: Any, rest: Any) -> Any:
    """g . (C - soft) + rest of one vector of states."""
    if V == 2:
        rest = g1 * d1 + rest
    return g0 * d0 + rest


@inlined
def log2_share(alpha: Floats, at: int, m: Any, offset: np.float32) -> Any:
    """log2 of what makes a probability of a weight 2**(t - m)."""
    share = load(alpha, at) + m + splat(offset)
    return larger(smaller(share, splat(_CEILING)), splat(FLOOR))


@inlined
def close_chunk(i0: int, top: Any, shape: Shape, scratch: Scratch) -> Any:
    """The new message of a chunk of lanes; returns the running maximum."""
    for b in range(shape.chunk):
        message = load(scratch.peaks, b * LANES) + log2(load(scratch.sums, b * LANES))
        store(scratch.lanes, i0 + b * LANES, message)
        top = larger(message, top)
    return top


@kernel
def at_end(alpha: Floats, tangent: Any, shape: Shape, pin: int) -> tuple[float, float]:
    """log2 of the sum of the last row of alpha, or its entry at the pin; the tangent's mean."""
    last, mean = shape.N * shape.width, 0.0
    if pin >= 0:
        if tangent is not None:
            mean = float(tangent[last + pin])
        return float(alpha[last + pin]), mean
    mass, gains = splat(ZERO), splat(ZERO)
    for i in range(last, last + shape.width, LANES):
        p = exp2(larger(load(alpha, i), splat(FLOOR)))
        mass = mass + p
        if tangent is not None:
            gains = p * load(tangent, i) + gains
    Z = np.float64(total(mass))
    return math.log2(Z), total(gains) / Z
