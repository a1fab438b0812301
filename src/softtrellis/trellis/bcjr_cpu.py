# mypy: allow-untyped-decorators
"""BCJR on the CPU: the sweeps of ``bcjr_torch`` as vectorised loops, one thread per tile.

Messages are base-2 logarithms of alpha and beta per overlap, less their maximum at every step, so
one code serves every temperature. The step is alpha'(v) = m + log2 sum_a 2**(t_a - m) with
t_a = alpha(u_a) - |C[s_a] - w|^2 / (T ln 2) and m the largest t_a. The backward pass carries
conditional means beside them (the expectation semiring, normalised): with
h_s = g . (C[s] - soft), the tangent of alpha at v is E[sum of h so far | v] and that of beta at u
is E[sum of h to come | u].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from softtrellis.trellis._numba_math import (
    LANES,
    exp2,
    larger,
    largest,
    load,
    log2,
    smaller,
    splat,
    store,
    total,
)
from softtrellis.trellis._overlaps_cpu import (
    UNREACHABLE,
    backward_code,
    forward_code,
    from_lanes,
    incoming,
    over_threads,
    shape_of,
    states_of_blocks,
    transposed,
)

_NEVER = np.float32(UNREACHABLE)
_LEAST = np.float32(-3e38)
_FLOOR = np.float32(-125.0)  # 2**floor, the smallest weight, is a normal number
_CEILING = np.float32(64.0)
_ZERO = np.float32(0.0)
_LN2 = math.log(2.0)

_kernel = njit(nogil=True, error_model="numpy", cache=True)
_inlined = njit(nogil=True, error_model="numpy", cache=True, forceinline=True)


@_inlined
def _candidates(code, i0, message, row, w, at_w, dims, kappa, shape, t, peaks):  # type: ignore[no-untyped-def]
    """t_r = message_r - kappa |C - w|^2 of a chunk of lanes, and the peak m of every lane."""
    V = len(dims)
    w0, w1, scale = splat(w[at_w]), splat(w[at_w + V - 1]), splat(kappa)
    at = 0
    for b in range(shape.chunk):
        i = i0 + b * LANES
        x, c = row + (i & (shape.period - 1)), i * shape.R * V
        m = splat(_LEAST)
        for _ in range(shape.R):
            d0 = load(code, c) - w0
            energy = d0 * d0
            if V == 2:
                d1 = load(code, c + LANES) - w1
                energy = d1 * d1 + energy
            score = load(message, x) - scale * energy
            store(t, at, score)
            m = larger(score, m)
            c += V * LANES
            x += shape.period
            at += LANES
        store(peaks, b * LANES, m)


@_inlined
def _weights(shape, t, peaks):  # type: ignore[no-untyped-def]
    """t_r becomes 2**(t_r - m), which lies between 2**-125 and 1."""
    floor = splat(_FLOOR)
    at = 0
    for b in range(shape.chunk):
        m = load(peaks, b * LANES)
        for _ in range(shape.R):
            store(t, at, exp2(larger(load(t, at) - m, floor)))
            at += LANES


@_inlined
def _masses(shape, t, peaks, sums):  # type: ignore[no-untyped-def]
    """The sum over r of 2**(t_r - m) in every lane."""
    floor = splat(_FLOOR)
    at = 0
    for b in range(shape.chunk):
        m, s = load(peaks, b * LANES), splat(_ZERO)
        for _ in range(shape.R):
            s = s + exp2(larger(load(t, at) - m, floor))
            at += LANES
        store(sums, b * LANES, s)


@_inlined
def _sum(t, at, R):  # type: ignore[no-untyped-def]
    s = splat(_ZERO)
    for _ in range(R):
        s = s + load(t, at)
        at += LANES
    return s


@_inlined
def _gain(code, c, V, g0, g1, rest):  # type: ignore[no-untyped-def]
    """g . C + rest, of one vector of states."""
    if V == 2:
        rest = g1 * load(code, c + LANES) + rest
    return g0 * load(code, c) + rest


@_inlined
def _posterior(alpha, at, m, offset):  # type: ignore[no-untyped-def]
    """log2 of what turns a state's weight 2**(t - m) into its marginal probability."""
    return larger(smaller(load(alpha, at) + m + splat(offset), splat(_CEILING)), splat(_FLOOR))


@_kernel
def _end(message, row, shape, pin):  # type: ignore[no-untyped-def]
    """Free ends: every overlap at no cost; pinned ends (pin >= 0): only one."""
    for u in range(shape.width):
        message[row + u] = _ZERO if u == pin or (pin < 0 and u < shape.U) else _NEVER


@_kernel
def _log2_partition(alpha, row, scale, shape, pin):  # type: ignore[no-untyped-def]
    if pin >= 0:
        return scale + alpha[row + pin]
    mass = 0.0
    for u in range(shape.U):
        mass += 2.0 ** np.float64(alpha[row + u])
    return scale + math.log2(mass)


@_kernel
def _alpha_sweep(w, g, soft, first, kappa, code, dims, shape, alpha, tangent, scale, work):  # type: ignore[no-untyped-def]
    """alpha [N + 1, width] from its row 0 on; scale [N + 1] is what was taken off it.

    With ``tangent`` [N + 1, width], also the mean of the sum of h up to every overlap.
    """
    V, R, K = len(dims), shape.R, shape.chunk
    t, peaks, sums, lanes, spare, rows, tangents, tangent_lanes, _ = work
    zero = splat(_ZERO)
    scale[0] = 0.0
    for step in range(shape.N):
        row, at_w = step * shape.width, first + step * V
        short = shape.W < LANES
        if short:
            incoming(alpha, row, rows, shape)
        if tangent is not None:
            if short:
                incoming(tangent, row, tangents, shape)
                past = tangents
            else:
                past = tangent
            g0, g1 = splat(g[at_w]), splat(g[at_w + V - 1])
            rest = g[at_w] * soft[at_w]
            if V == 2:
                rest += g[at_w + 1] * soft[at_w + 1]
            rest = splat(rest)
        message, start = (rows, 0) if short else (alpha, row)
        top = splat(_LEAST)
        for i0 in range(0, shape.width, K * LANES):
            _candidates(code, i0, message, start, w, at_w, dims, kappa, shape, t, peaks)
            if tangent is None:
                _masses(shape, t, peaks, sums)
            else:
                _weights(shape, t, peaks)
                at, c = 0, i0 * R * V
                for b in range(K):
                    i = i0 + b * LANES
                    x, y = start + (i & (shape.period - 1)), zero
                    s = _sum(t, at, R)
                    for _ in range(R):
                        weight = load(t, at)
                        y = weight * _gain(code, c, V, g0, g1, load(past, x)) + y
                        c += V * LANES
                        x += shape.period
                        at += LANES
                    store(sums, b * LANES, s)
                    store(tangent_lanes, i, y / s - rest)
            for b in range(K):
                after = load(peaks, b * LANES) + log2(load(sums, b * LANES))
                store(lanes, i0 + b * LANES, after)
                top = larger(after, top)
        shift = largest(top)
        scale[step + 1] = scale[step] + shift
        from_lanes(lanes, alpha, row + shape.width, spare, shape, shift)
        if tangent is not None:
            from_lanes(tangent_lanes, tangent, row + shape.width, spare, shape, _ZERO)


@_kernel
def _beta_sweep(w, first, kappa, code, dims, shape, alpha, scale, log_z, pin, values, entropy, at_entropy, work):  # type: ignore[no-untyped-def]
    """Values of one tile: E[C[s]], as the clipped weight plus a mean of differences from it."""
    V, R, K = len(dims), shape.R, shape.chunk
    t, peaks, sums, lanes, spare, rows, sums0, sums1, logs = work
    zero = splat(_ZERO)
    _end(lanes, 0, shape, pin)
    transposed(lanes, rows, spare, shape, _ZERO)
    offset = -log_z
    for step in range(shape.N - 1, -1, -1):
        at_w, row = first + step * V, step * shape.width
        top, mass, mass0, mass1, log_mass = splat(_LEAST), zero, zero, zero, zero
        scaled = np.float32(offset + scale[step])
        for i0 in range(0, shape.width, K * LANES):
            _candidates(code, i0, rows, 0, w, at_w, dims, kappa, shape, t, peaks)
            if entropy is not None:
                at = 0
                for b in range(K):
                    m, e = load(peaks, b * LANES), zero
                    for _ in range(R):
                        x = larger(load(t, at) - m, splat(_FLOOR))
                        e = x * exp2(x) + e
                        at += LANES
                    store(logs, b * LANES, e)
            _weights(shape, t, peaks)
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
                store(sums, b * LANES, s)
                store(sums0, b * LANES, y0)
                store(sums1, b * LANES, y1)
            for b in range(K):
                i, m, s = i0 + b * LANES, load(peaks, b * LANES), load(sums, b * LANES)
                before = m + log2(s)
                store(lanes, i, before)
                top = larger(before, top)
                power = _posterior(alpha, row + i, m, scaled)
                p = exp2(power)
                if entropy is not None:
                    log_mass = p * (power * s + load(logs, b * LANES)) + log_mass
                mass = p * s + mass
                mass0 = p * load(sums0, b * LANES) + mass0
                mass1 = p * load(sums1, b * LANES) + mass1
        Z = np.float64(total(mass))
        values[at_w] = total(mass0) / Z
        if V == 2:
            values[at_w + 1] = total(mass1) / Z
        if entropy is not None:
            entropy[at_entropy + step] = max(_LN2 * (math.log2(Z) - total(log_mass) / Z), 0.0)
        shift = largest(top)
        offset += shift - math.log2(Z)
        transposed(lanes, rows, spare, shape, shift)


@_kernel
def _gradient_sweep(w, g, soft, first, g_log_z, kappa, code, dims, shape, alpha, tangent, scale, log_z, pin, grad_w, grad_code, work):  # type: ignore[no-untyped-def]
    """The second half of the backward pass for one tile: beta, its tangent, and the gradients."""
    V, R, K = len(dims), shape.R, shape.chunk
    t, peaks, sums, lanes, spare, rows, tangents, tangent_lanes, _ = work
    zero = splat(_ZERO)
    two_over_T = np.float32(2.0 * _LN2 * kappa)
    _end(lanes, 0, shape, pin)
    transposed(lanes, rows, spare, shape, _ZERO)
    tangents[:] = _ZERO
    offset = -log_z
    for step in range(shape.N - 1, -1, -1):
        at_w, row = first + step * V, step * shape.width
        w0, w1 = splat(w[at_w]), splat(w[at_w + V - 1])
        mean0, mean1 = splat(soft[at_w]), splat(soft[at_w + V - 1])
        g0, g1 = splat(g[at_w]), splat(g[at_w + V - 1])
        rest = g[at_w] * soft[at_w]
        if V == 2:
            rest += g[at_w + 1] * soft[at_w + 1]
        rest = splat(rest)
        top, mass, mass0, mass1 = splat(_LEAST), zero, zero, zero
        scaled = np.float32(offset + scale[step])
        for i0 in range(0, shape.width, K * LANES):
            _candidates(code, i0, rows, 0, w, at_w, dims, kappa, shape, t, peaks)
            _weights(shape, t, peaks)
            at, c = 0, i0 * R * V
            for b in range(K):
                i = i0 + b * LANES
                m, x = load(peaks, b * LANES), i & (shape.period - 1)
                p = exp2(_posterior(alpha, row + i, m, scaled))
                past = load(tangent, row + i) - rest
                z, z0, z1 = zero, zero, zero
                s = _sum(t, at, R)
                for _ in range(R):
                    weight = load(t, at)
                    whole = _gain(code, c, V, g0, g1, load(tangents, x) + past)
                    if grad_code is not None:
                        chance = weight * p
                        pull = chance * (whole + splat(g_log_z)) * splat(two_over_T)
                        old = load(grad_code, c) + chance * g0
                        store(grad_code, c, old - pull * (load(code, c) - w0))
                        if V == 2:
                            old = load(grad_code, c + LANES) + chance * g1
                            store(grad_code, c + LANES, old - pull * (load(code, c + LANES) - w1))
                    weight = weight * whole
                    z = z + weight
                    z0 = weight * load(code, c) + z0
                    if V == 2:
                        z1 = weight * load(code, c + LANES) + z1
                    c += V * LANES
                    x += shape.period
                    at += LANES
                store(sums, b * LANES, s)
                store(tangent_lanes, i, z / s - load(tangent, row + i))
                mass = p * s + mass
                mass0 = p * (z0 - mean0 * z) + mass0
                mass1 = p * (z1 - mean1 * z) + mass1
            for b in range(K):
                before = load(peaks, b * LANES) + log2(load(sums, b * LANES))
                store(lanes, i0 + b * LANES, before)
                top = larger(before, top)
        Z = np.float64(total(mass))
        grad_w[at_w] = two_over_T * (total(mass0) / Z + g_log_z * (soft[at_w] - w[at_w]))
        if V == 2:
            pull = g_log_z * (soft[at_w + 1] - w[at_w + 1])
            grad_w[at_w + 1] = two_over_T * (total(mass1) / Z + pull)
        shift = largest(top)
        offset += shift - math.log2(Z)
        transposed(lanes, rows, spare, shape, shift)
        transposed(tangent_lanes, tangents, spare, shape, _ZERO)


@_kernel
def _work(shape):  # type: ignore[no-untyped-def]
    """Scratch of one thread, in the order in which the sweeps unpack it."""
    chunk, rows = shape.chunk * LANES, shape.R * shape.period
    return (
        np.empty(shape.R * chunk, np.float32),
        np.empty(chunk, np.float32),
        np.empty(chunk, np.float32),
        np.empty(shape.width, np.float32),
        np.empty(shape.width, np.float32),
        np.empty(rows, np.float32),
        np.empty(max(rows, chunk), np.float32),
        np.empty(max(shape.width, chunk), np.float32),
        np.empty(chunk, np.float32),
    )


@_kernel
def _forward_tiles(start, stride, w, kappa, pins, ahead, back, dims, shape, values, log_z, entropy):  # type: ignore[no-untyped-def]
    alpha = np.empty((shape.N + 1) * shape.width, np.float32)
    scale, work = np.empty(shape.N + 1), _work(shape)
    alpha[:] = _NEVER
    for tile in range(start, kappa.size, stride):
        first, pin = tile * shape.N * len(dims), pins[tile]
        _end(alpha, 0, shape, pin)
        _alpha_sweep(
            w, None, None, first, kappa[tile], ahead, dims, shape, alpha, None, scale, work
        )
        all_paths = _log2_partition(
            alpha, shape.N * shape.width, scale[shape.N], shape, pin
        )
        log_z[tile] = _LN2 * all_paths
        _beta_sweep(
            w, first, kappa[tile], back, dims, shape, alpha, scale, all_paths, pin,
            values, entropy, tile * shape.N, work,
        )


@_kernel
def _backward_tiles(start, stride, w, g, soft, g_log_z, kappa, pins, ahead, back, dims, shape, grad_w, tile_code, grad_code):  # type: ignore[no-untyped-def]
    alpha = np.empty((shape.N + 1) * shape.width, np.float32)
    tangent = np.zeros(alpha.size, np.float32)
    scale, work = np.empty(shape.N + 1), _work(shape)
    alpha[:] = _NEVER
    for tile in range(start, kappa.size, stride):
        first, pin = tile * shape.N * len(dims), pins[tile]
        _end(alpha, 0, shape, pin)
        _alpha_sweep(
            w, g, soft, first, kappa[tile], ahead, dims, shape, alpha, tangent, scale, work
        )
        all_paths = _log2_partition(
            alpha, shape.N * shape.width, scale[shape.N], shape, pin
        )
        if grad_code is not None:
            tile_code[:] = _ZERO
        _gradient_sweep(
            w, g, soft, first, g_log_z[tile], kappa[tile], back, dims, shape, alpha, tangent,
            scale, all_paths, pin, grad_w, tile_code, work,
        )
        if grad_code is not None:
            for s in range(grad_code.size):
                grad_code[s] += tile_code[s]


def _flat(x: Tensor) -> np.ndarray:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(
            f"the CPU kernels take float32 tensors on the CPU, got {x.dtype} on {x.device}"
        )
    return x.detach().contiguous().view(-1).numpy()


def _arguments(w, codebook, spec, temperature, pins):
    kappa = (1.0 / (_LN2 * temperature.double())).float().numpy()
    ends = torch.full((w.shape[0],), -1) if pins is None else pins
    return (
        kappa, ends.to(torch.int64).contiguous().numpy(),
        _flat(forward_code(codebook.detach(), spec)), _flat(backward_code(codebook.detach(), spec)),
        (0,) * spec.V, shape_of(spec, w.shape[1]),
    )


def soft_forward(w, codebook, spec, temperature, pins, with_entropy):
    values, log_z = torch.empty_like(w, memory_format=torch.contiguous_format), w.new_empty(w.shape[0])
    entropy = w.new_empty(w.shape[:2]) if with_entropy else None
    fixed = (_flat(w), *_arguments(w, codebook, spec, temperature, pins))
    results = (_flat(values), _flat(log_z), None if entropy is None else _flat(entropy))
    over_threads(w.shape[0], lambda first, stride: _forward_tiles(first, stride, *fixed, *results))
    return values, log_z, entropy


def soft_backward(w, codebook, spec, temperature, pins, values, grad_values, grad_log_z, with_codebook):
    grad_w = torch.empty_like(w, memory_format=torch.contiguous_format)
    args = _arguments(w, codebook, spec, temperature, pins)
    fixed = (_flat(w), _flat(grad_values), _flat(values), _flat(grad_log_z), *args)

    def run(first, stride):
        code, tile_code = None, None
        if with_codebook:
            code, tile_code = np.zeros(args[3].size), np.empty(args[3].size, np.float32)
        _backward_tiles(first, stride, *fixed, _flat(grad_w), tile_code, code)
        return code

    parts = over_threads(w.shape[0], run)
    if not with_codebook:
        return grad_w, None
    blocks = torch.from_numpy(sum(parts)).to(torch.float32)
    return grad_w, states_of_blocks(blocks, spec)
