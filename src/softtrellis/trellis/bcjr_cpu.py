# mypy: allow-untyped-decorators
"""BCJR on the CPU: the sweeps of ``bcjr_torch`` as vector loops, one tile per thread at a time.

Messages are base-2 logarithms of alpha and beta, less their maximum at every step, so one code
serves every temperature: alpha'(v) = m + log2 sum_r 2**(t_r - m) over the R candidates
t_r = alpha(u_r) - |C[s_r] - w|^2 / (T ln 2), m being about the largest. Beside the messages the
backward pass carries means (the expectation semiring, normalised). With h_s = g . (C[s] - values),
the tangent of alpha at v is E[sum of h so far | v], that of beta at u E[sum of h to come | u].
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softtrellis.spec import TrellisSpec
from softtrellis.trellis._bcjr_steps import (
    FLOOR,
    LEAST,
    LN2,
    ZERO,
    CodeGradient,
    Doubles,
    Problem,
    Scratch,
    Upstream,
    aim_of_step,
    at_end,
    candidates,
    close_chunk,
    gain_of,
    log2_share,
    new_scratch,
    sum_of_rows,
    total_weights,
    weights,
)
from softtrellis.trellis._numba_math import (
    LANES,
    exp2,
    exp2_above,
    larger,
    largest,
    load,
    splat,
    store,
    total,
)
from softtrellis.trellis._overlaps_cpu import (
    UNREACHABLE,
    Floats,
    as_array,
    backward_code,
    end_message,
    entry,
    forward_code,
    from_lanes,
    kernel,
    over_threads,
    pins_or_free,
    shape_of,
    spread_rows,
    states_of_blocks,
    transposed,
)


@kernel
def _alpha_sweep(
    problem: Problem, tile: int, upstream: Upstream | None, alpha: Floats, tangent: Any,
    scale: Doubles, scratch: Scratch,
) -> tuple[float, float]:  # fmt: skip
    """Fills alpha [N + 1, width]; scale [N + 1] is what its rows lack. Returns log2 Z.

    With ``upstream`` also fills tangent [N + 1, width], the tangents of alpha (else None), and
    returns the mean of the whole sum of h.
    """
    shape, V, kappa = problem.shape, len(problem.components), problem.kappa[tile]
    R, K, pin = shape.R, shape.chunk, problem.pins[tile]
    t, rows, past = scratch.t, scratch.rows, scratch.tangent_rows
    end_message(alpha, shape, pin)
    scale[0] = 0.0
    for step in range(shape.N):
        row, at_w = step * shape.width, (tile * shape.N + step) * V
        aim = aim_of_step(problem, at_w)
        short = shape.W < LANES
        if short:
            spread_rows(alpha, row, rows, shape)
        message, first = (rows, 0) if short else (alpha, row)
        if upstream is not None:
            g0, g1 = splat(upstream.g[at_w]), splat(upstream.g[at_w + V - 1])
            soft0, soft1 = splat(upstream.soft[at_w]), splat(upstream.soft[at_w + V - 1])
            if short:
                spread_rows(tangent, row, past, shape)
            else:
                past = tangent
        top = splat(LEAST)
        for i0 in range(0, shape.width, K * LANES):
            candidates(problem.ahead, i0, message, first, aim, kappa, problem, scratch)
            if upstream is None:
                total_weights(shape, scratch)
            else:
                weights(shape, scratch)
                at, c = 0, i0 * R * V
                for b in range(K):
                    i = i0 + b * LANES
                    x, y = first + (i & (shape.period - 1)), splat(ZERO)
                    s = sum_of_rows(t, at, R)
                    for _ in range(R):
                        d0 = load(problem.ahead, c) - soft0
                        d1 = load(problem.ahead, c + LANES) - soft1 if V == 2 else d0
                        y = load(t, at) * gain_of(d0, d1, V, g0, g1, load(past, x)) + y
                        c += V * LANES
                        x += shape.period
                        at += LANES
                    store(scratch.sums, b * LANES, s)
                    store(scratch.tangent_lanes, i, y / s)
            top = close_chunk(i0, top, shape, scratch)
        peak = largest(top)
        scale[step + 1] = scale[step] + peak - kappa * aim[4]
        from_lanes(scratch.lanes, alpha, row + shape.width, scratch.spare, shape, peak)
        if upstream is not None:
            from_lanes(
                scratch.tangent_lanes, tangent, row + shape.width, scratch.spare, shape, ZERO
            )
    log2_mass, mean = at_end(alpha, tangent, shape, pin)
    return scale[shape.N] + log2_mass, mean


@kernel
def _beta_sweep(
    problem: Problem, tile: int, alpha: Floats, scale: Doubles, log2_z: float, values: Floats,
    entropy: Floats | None, scratch: Scratch,
) -> None:  # fmt: skip
    """Beta, joined with alpha to the values of one tile and the entropies of its marginals."""
    shape, V, kappa = problem.shape, len(problem.components), problem.kappa[tile]
    R, K, code, t = shape.R, shape.chunk, problem.back, scratch.t
    zero = splat(ZERO)
    end_message(scratch.lanes, shape, problem.pins[tile])
    transposed(scratch.lanes, scratch.rows, scratch.spare, shape, ZERO)
    lacking = -log2_z
    for step in range(shape.N - 1, -1, -1):
        row, at_w = step * shape.width, (tile * shape.N + step) * V
        aim = aim_of_step(problem, at_w)
        lacking -= kappa * aim[4]
        offset = np.float32(lacking + scale[step])
        top, mass, mass0, mass1, log_mass = splat(LEAST), zero, zero, zero, zero
        for i0 in range(0, shape.width, K * LANES):
            candidates(code, i0, scratch.rows, 0, aim, kappa, problem, scratch)
            if entropy is not None:
                at = 0
                for b in range(K):
                    m, logs = load(scratch.peaks, b * LANES), zero
                    for _ in range(R):
                        x = larger(load(t, at), m + splat(FLOOR))
                        logs = (x - m) * exp2_above(x, m) + logs
                        at += LANES
                    store(scratch.logs, b * LANES, logs)
            weights(shape, scratch)
            at, c = 0, i0 * R * V
            for b in range(K):
                s, y0, y1 = zero, zero, zero
                for _ in range(R):
                    x = load(t, at)
                    s = s + x
                    y0 = x * load(code, c) + y0
                    if V == 2:
                        y1 = x * load(code, c + LANES) + y1
                    c += V * LANES
                    at += LANES
                store(scratch.sums, b * LANES, s)
                store(scratch.sums0, b * LANES, y0)
                store(scratch.sums1, b * LANES, y1)
            for b in range(K):
                m, s = load(scratch.peaks, b * LANES), load(scratch.sums, b * LANES)
                log_share = log2_share(alpha, row + i0 + b * LANES, m, offset)
                share = exp2(log_share)
                mass = share * s + mass
                mass0 = share * load(scratch.sums0, b * LANES) + mass0
                mass1 = share * load(scratch.sums1, b * LANES) + mass1
                if entropy is not None:
                    log_mass = share * (log_share * s + load(scratch.logs, b * LANES)) + log_mass
            top = close_chunk(i0, top, shape, scratch)
        Z = np.float64(total(mass))
        values[at_w] = total(mass0) / Z
        if V == 2:
            values[at_w + 1] = total(mass1) / Z
        if entropy is not None:
            nats = LN2 * (math.log2(Z) - total(log_mass) / Z)
            entropy[tile * shape.N + step] = max(nats, 0.0)
        peak = largest(top)
        lacking += peak - math.log2(Z)
        transposed(scratch.lanes, scratch.rows, scratch.spare, shape, peak)


@kernel
def _gradient_sweep(
    problem: Problem, tile: int, upstream: Upstream, alpha: Floats, tangent: Floats,
    scale: Doubles, log2_z: float, mean_at_end: float, grad_w: Floats,
    code_gradient: CodeGradient | None, scratch: Scratch,
) -> None:  # fmt: skip
    """Beta and its tangent, joined with alpha's to the gradients of one tile."""
    shape, V, kappa = problem.shape, len(problem.components), problem.kappa[tile]
    R, K, code, t = shape.R, shape.chunk, problem.back, scratch.t
    soft, g_log_z = upstream.soft, upstream.g_log_z[tile]
    two_over_T = np.float32(2.0 * LN2 * kappa)
    zero = splat(ZERO)
    end_message(scratch.lanes, shape, problem.pins[tile])
    transposed(scratch.lanes, scratch.rows, scratch.spare, shape, ZERO)
    scratch.tangent_rows[:] = ZERO
    drift = np.float32(mean_at_end)  # E[sum of h]: taken off
    lacking = -log2_z
    for step in range(shape.N - 1, -1, -1):
        row, at_w = step * shape.width, (tile * shape.N + step) * V
        aim = aim_of_step(problem, at_w)
        w0, w1 = splat(problem.w[at_w]), splat(problem.w[at_w + V - 1])
        soft0, soft1 = splat(soft[at_w]), splat(soft[at_w + V - 1])
        g0, g1 = splat(upstream.g[at_w]), splat(upstream.g[at_w + V - 1])
        lacking -= kappa * aim[4]
        offset = np.float32(lacking + scale[step])
        top, mass, mass0, mass1, mean = splat(LEAST), zero, zero, zero, zero
        for i0 in range(0, shape.width, K * LANES):
            candidates(code, i0, scratch.rows, 0, aim, kappa, problem, scratch)
            weights(shape, scratch)
            at, c = 0, i0 * R * V
            for b in range(K):
                i = i0 + b * LANES
                x, m = i & (shape.period - 1), load(scratch.peaks, b * LANES)
                s = sum_of_rows(t, at, R)
                share = exp2(log2_share(alpha, row + i, m, offset))
                past = load(tangent, row + i) - splat(drift)
                z, z0, z1 = zero, zero, zero
                for _ in range(R):
                    weight = load(t, at)
                    d0 = load(code, c) - soft0
                    d1 = load(code, c + LANES) - soft1 if V == 2 else d0
                    whole = gain_of(d0, d1, V, g0, g1, load(scratch.tangent_rows, x) + past)
                    if code_gradient is not None:
                        p, grad = weight * share, code_gradient.tile
                        pull = p * (whole + splat(g_log_z)) * splat(two_over_T)
                        grad0 = p * g0 - pull * (load(code, c) - w0)
                        store(grad, c, load(grad, c) + grad0)
                        if V == 2:
                            grad1 = p * g1 - pull * (load(code, c + LANES) - w1)
                            store(grad, c + LANES, load(grad, c + LANES) + grad1)
                    weight = weight * whole
                    z = z + weight
                    z0 = weight * d0 + z0
                    if V == 2:
                        z1 = weight * d1 + z1
                    c += V * LANES
                    x += shape.period
                    at += LANES
                store(scratch.sums, b * LANES, s)
                store(scratch.tangent_lanes, i, z / s - past)
                mass = share * s + mass
                mean = share * z + mean
                mass0 = share * z0 + mass0
                mass1 = share * z1 + mass1
            top = close_chunk(i0, top, shape, scratch)
        Z = np.float64(total(mass))
        pull0 = total(mass0) / Z + g_log_z * (soft[at_w] - problem.w[at_w])
        grad_w[at_w] = two_over_T * pull0
        if V == 2:
            pull1 = total(mass1) / Z + g_log_z * (soft[at_w + 1] - problem.w[at_w + 1])
            grad_w[at_w + 1] = two_over_T * pull1
        drift += np.float32(total(mean) / Z)
        peak = largest(top)
        lacking += peak - math.log2(Z)
        transposed(scratch.lanes, scratch.rows, scratch.spare, shape, peak)
        transposed(scratch.tangent_lanes, scratch.tangent_rows, scratch.spare, shape, ZERO)


@entry
def _forward_tiles(
    first: int, stride: int, problem: Problem, values: Floats, log_z: Floats,
    entropy: Floats | None,
) -> None:  # fmt: skip
    shape = problem.shape
    alpha = np.full((shape.N + 1) * shape.width, UNREACHABLE, np.float32)
    scale, scratch = np.empty(shape.N + 1), new_scratch(shape)
    for tile in range(first, problem.kappa.size, stride):
        log2_z, _ = _alpha_sweep(problem, tile, None, alpha, None, scale, scratch)
        log_z[tile] = LN2 * log2_z
        _beta_sweep(problem, tile, alpha, scale, log2_z, values, entropy, scratch)


@entry
def _backward_tiles(
    first: int, stride: int, problem: Problem, upstream: Upstream, grad_w: Floats,
    code_gradient: CodeGradient | None,
) -> None:  # fmt: skip
    shape = problem.shape
    alpha = np.full((shape.N + 1) * shape.width, UNREACHABLE, np.float32)
    tangent = np.zeros(alpha.size, np.float32)
    scale, scratch = np.empty(shape.N + 1), new_scratch(shape)
    for tile in range(first, problem.kappa.size, stride):
        log2_z, mean = _alpha_sweep(problem, tile, upstream, alpha, tangent, scale, scratch)
        if code_gradient is not None:
            code_gradient.tile[:] = ZERO
        _gradient_sweep(
            problem,
            tile,
            upstream,
            alpha,
            tangent,
            scale,
            log2_z,
            mean,
            grad_w,
            code_gradient,
            scratch,
        )
        if code_gradient is not None:
            for i in range(code_gradient.tile.size):
                code_gradient.total[i] += code_gradient.tile[i]


def _problem(
    w: Tensor, codebook: Tensor, spec: TrellisSpec, temperature: Tensor, pins: Tensor | None
) -> Problem:
    box = torch.stack([codebook.amin(0), codebook.amax(0)], 1)
    return Problem(
        as_array(w),
        as_array((1.0 / (LN2 * temperature.double())).float()),
        pins_or_free(pins, w.shape[0]),
        as_array(forward_code(codebook, spec)),
        as_array(backward_code(codebook, spec)),
        as_array(box.repeat(2 // spec.V, 1)),
        (0,) * spec.V,
        shape_of(spec, w.shape[1]),
    )


def soft_forward(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    pins: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``bcjr_torch.soft_forward``, for float32 tensors on the CPU.

    Memory beyond inputs and outputs: (N + 1) U floats for every thread of
    ``torch.get_num_threads()``. The results do not depend on the number of threads.

    Raises:
        ValueError: a tensor of another dtype or on another device.
    """
    values = torch.empty_like(w, memory_format=torch.contiguous_format)
    log_z = w.new_empty(w.shape[0])
    entropy = w.new_empty(w.shape[:2]) if with_entropy else None
    problem = _problem(w, codebook, spec, temperature, pins)
    results = (as_array(values), as_array(log_z), None if entropy is None else as_array(entropy))
    over_threads(w.shape[0], lambda first, n: _forward_tiles(first, n, problem, *results))
    return values, log_z, entropy


def soft_backward(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    pins: Tensor | None,
    values: Tensor,
    grad_values: Tensor,
    grad_log_z: Tensor | None,
    with_codebook: bool,
) -> tuple[Tensor, Tensor | None]:
    """As ``bcjr_torch.soft_backward``, for float32 tensors on the CPU.

    Memory beyond inputs and outputs: 2 (N + 1) U floats for every thread, and 3 S V with the
    gradient of the codebook. That gradient depends on the number of threads, to rounding.

    Raises:
        ValueError: a tensor of another dtype or on another device.
    """
    grad_w = torch.empty_like(w, memory_format=torch.contiguous_format)
    problem = _problem(w, codebook, spec, temperature, pins)
    grad_log_z = w.new_zeros(len(w)) if grad_log_z is None else grad_log_z
    upstream = Upstream(as_array(grad_values), as_array(values), as_array(grad_log_z))

    def run(first: int, stride: int) -> CodeGradient | None:
        gradient = None
        if with_codebook:
            gradient = CodeGradient(np.empty_like(problem.back), np.zeros(problem.back.size))
        _backward_tiles(first, stride, problem, upstream, as_array(grad_w), gradient)
        return gradient

    parts = over_threads(w.shape[0], run)
    if not with_codebook:
        return grad_w, None
    blocks = torch.from_numpy(np.sum([part.total for part in parts], axis=0)).to(w.dtype)
    return grad_w, states_of_blocks(blocks, spec)
