"""One step of the BCJR sweeps in Triton, for a few tiles that share every read of the codebook.

Messages are base-2 logarithms, one per overlap. A weight is cut into p, which likely states are
near, and the rest o. With d = (C[s] - p) * sqrt(log2(e) / T) and ``far`` = 2 o * sqrt(log2(e) / T)
a state's weight is 2**-(d . d - far . d), up to a factor that all states share: what matters stays
small, and accurate, for an outlier too. Messages into step t are alpha_t; every step subtracts from
them the greatest one of the step before (``shift``), so that what matters stays near zero.

A tangent is carried as a conditional expectation: ``a`` of the part of G that lies before an
overlap, ``b`` of the part behind it, given that the path goes through it.
"""

# ruff: noqa: RUF005  (Triton's tuples grow by addition)
# mypy: disable-error-code="no-untyped-def, assignment, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from softtrellis.trellis.launch_triton import scatter, touch

IMPOSSIBLE = tl.constexpr(-1e30)


@triton.jit
def log2(x, FAST: tl.constexpr):
    """Base-2 logarithm; with FAST (a GPU, not the interpreter) in one instruction."""
    if FAST:
        return libdevice.fast_log2f(x)
    return tl.log2(x)


@triton.jit
def _divide(x, y, FAST: tl.constexpr):
    if FAST:
        return libdevice.fast_dividef(x, y)
    return x / y


@triton.jit
def _maximum(values, COUNT: tl.constexpr):
    top = values[0]
    for i in tl.static_range(1, COUNT):
        top = tl.maximum(top, values[i])
    return top


@triton.jit
def _alpha_chunk(
    codebook, alpha, a, w, far, gain, scale, rows, v, chunk, top, mass, sum_a,
    U: tl.constexpr, R: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    COLUMNS: tl.constexpr, CHOICES: tl.constexpr, TANGENT: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Adds CHOICES predecessors of the overlaps v to the running log-sums of M tiles."""
    c0 = ()
    c1 = ()
    for i in tl.static_range(CHOICES):
        s = (chunk * CHOICES + i) * U + v
        c0 = c0 + (tl.load(codebook + s),)
        if V == 2:
            c1 = c1 + (tl.load(codebook + R * U + s),)
    new_top = ()
    new_mass = ()
    new_sum = ()
    for m in tl.static_range(M):
        x = ()
        h = ()
        for i in tl.static_range(CHOICES):
            u = ((chunk * CHOICES + i) * U + rows * COLUMNS) // R
            d = tl.fma(c0[i], scale[m], -w[m * V])
            y = tl.fma(d * -1.0, d, tl.load(alpha + m * U + u, cache_modifier=CACHE))
            y = tl.fma(far[m * V], d, y)
            if TANGENT:
                known = tl.load(a + m * U + u, cache_modifier=CACHE)
                g = tl.fma(gain[m * V], d, known)
            if V == 2:
                d = tl.fma(c1[i], scale[m], -w[m * V + 1])
                y = tl.fma(d * -1.0, d, y)
                y = tl.fma(far[m * V + 1], d, y)
                if TANGENT:
                    g = tl.fma(gain[m * V + 1], d, g)
            x = x + (y,)
            if TANGENT:
                h = h + (g,)
        high = _maximum(x, CHOICES)
        total = mass[m]
        weighted = sum_a[m]
        if R > CHOICES:
            high = tl.maximum(high, top[m])
            kept = tl.exp2(top[m] - high)
            total = total * kept
            weighted = weighted * kept
        for i in tl.static_range(CHOICES):
            p = tl.exp2(x[i] - high)
            total += p
            if TANGENT:
                weighted = tl.fma(p, h[i], weighted)
        new_top = new_top + (high,)
        new_mass = new_mass + (total,)
        new_sum = new_sum + (weighted,)
    return new_top, new_mass, new_sum


@triton.jit
def near_of(weight, value, low, high, TANGENT: tl.constexpr):
    """Where a step's distances are measured from, so that those of likely states are small.

    That is the weight, or the edge of the codebook's range that is next to it; in the backward pass
    the soft or the hard codeword, which neighbouring steps can hold far from the weight.
    """
    if TANGENT:
        return tl.load(value)
    return tl.minimum(tl.maximum(weight, low), high)


@triton.jit
def alpha_step(
    codebook, alpha, a, new_alpha, new_a, w, far, gain, scale, shift, turn,
    U: tl.constexpr, R: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr, TANGENT: tl.constexpr,
    FAST: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """alpha_{t+1} (and a_{t+1}) from alpha_t (and a_t) for M tiles; returns the greatest [M].

    codebook [V, S]; messages are rows [M, U]; the scalars of the step come as tuples of M (``w``,
    ``far`` and ``gain``: V per tile). ``turn`` reverses the order of the blocks: taken forth and
    back by turns, the end of the codebook is still in the processor's cache.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    if THREADS > 0:
        touch(alpha, M * U, THREADS)
        if TANGENT:
            touch(a, M * U, THREADS)
    CACHE: tl.constexpr = "" if THREADS > 0 else ".cg"
    peak = ()
    for _ in tl.static_range(M):
        peak = peak + (tl.full([ROWS, COLUMNS], -3e38, tl.float32),)
    for i_block in range(U // (ROWS * COLUMNS)):
        j = tl.where(turn, U // (ROWS * COLUMNS) - 1 - i_block, i_block)
        rows = j * ROWS + row
        v = rows * COLUMNS + column
        top = ()
        mass = ()
        sum_a = ()
        for _ in tl.static_range(M):
            top = top + (tl.full([ROWS, COLUMNS], -3e38, tl.float32),)
            mass = mass + (tl.zeros([ROWS, COLUMNS], tl.float32),)
            sum_a = sum_a + (tl.zeros([ROWS, COLUMNS], tl.float32),)
        if R <= 4 * CHOICES:
            for chunk in tl.static_range(R // CHOICES):
                top, mass, sum_a = _alpha_chunk(
                    codebook, alpha, a, w, far, gain, scale, rows, v, chunk, top, mass, sum_a,
                    U, R, V, M, COLUMNS, CHOICES, TANGENT, CACHE,
                )  # fmt: skip
        else:
            for chunk in range(R // CHOICES):
                top, mass, sum_a = _alpha_chunk(
                    codebook, alpha, a, w, far, gain, scale, rows, v, chunk, top, mass, sum_a,
                    U, R, V, M, COLUMNS, CHOICES, TANGENT, CACHE,
                )  # fmt: skip
        new_peak = ()
        for m in tl.static_range(M):
            message = (top[m] - shift[m]) + log2(mass[m], FAST)
            tl.store(new_alpha + m * U + v, message)
            if TANGENT:
                mean = _divide(sum_a[m], mass[m], FAST)
                tl.store(new_a + m * U + v, mean)
            new_peak = new_peak + (tl.maximum(peak[m], message),)
        peak = new_peak
    greatest = ()
    for m in tl.static_range(M):
        greatest = greatest + (tl.max(peak[m]),)
    return greatest


@triton.jit
def beta_step(
    codebook, alpha, beta, a, b, new_beta, new_b, w, far, gain, scale, shift,
    turn, codebook_sum, grad, grad_log_z, factor,
    U: tl.constexpr, R: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
    TANGENT: tl.constexpr, ENTROPY: tl.constexpr, CODEBOOK: tl.constexpr, FAST: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """beta_t (and b_t) from beta_{t+1} (and b_{t+1}), and what the posterior of step t yields.

    A state's posterior is 2**(alpha_t - shift + beta_{t+1} - d . d + far . d): no maximum is
    needed, because what underflows there is negligible in every later sum as well. codebook
    [V, R, U]; beta and b lie transposed, overlap x * R + y at y * (U / R) + x. Returns tuples of M
    scalars: the sum of the posterior P, of P D d (V per tile) and of P log2 P, where D is a
    path's G with TANGENT and 1 without.
    """
    RM: tl.constexpr = R if R < U else U
    ACROSS: tl.constexpr = U // RM
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    if THREADS > 0:
        touch(beta, M * U, THREADS)
        if TANGENT:
            touch(b, M * U, THREADS)
    mass = ()
    mass_d = ()
    mass_x = ()
    for _ in tl.static_range(M):
        mass = mass + (tl.zeros([ROWS, COLUMNS], tl.float32),)
        mass_x = mass_x + (tl.zeros([ROWS, COLUMNS], tl.float32),)
        for _ in tl.static_range(V):
            mass_d = mass_d + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    for i_block in range(U // (ROWS * COLUMNS)):
        j = tl.where(turn, U // (ROWS * COLUMNS) - 1 - i_block, i_block)
        columns = (j % (ACROSS // COLUMNS)) * COLUMNS + column
        u = ((j // (ACROSS // COLUMNS)) * ROWS + row) * ACROSS + columns
        before = ()
        before_a = ()
        p_of_u = ()
        h_of_u = ()
        for m in tl.static_range(M):
            before = before + (tl.load(alpha + m * U + u, cache_modifier=".cg") - shift[m],)
            p_of_u = p_of_u + (tl.zeros([ROWS, COLUMNS], tl.float32),)
            h_of_u = h_of_u + (tl.zeros([ROWS, COLUMNS], tl.float32),)
            if TANGENT:
                before_a = before_a + (tl.load(a + m * U + u, cache_modifier=".cg"),)
        for chunk in range(R // CHOICES):
            for i in tl.static_range(CHOICES):
                c = chunk * CHOICES + i
                c0 = tl.load(codebook + c * U + u)
                sum0 = c0 * 0.0
                sum1 = sum0
                if V == 2:
                    c1 = tl.load(codebook + R * U + c * U + u)
                new_p = ()
                new_h = ()
                new_d = ()
                new_x = ()
                for m in tl.static_range(M):
                    at = (c % RM) * ACROSS + columns
                    d0 = tl.fma(c0, scale[m], -w[m * V])
                    x = tl.fma(d0 * -1.0, d0, before[m] + tl.load(beta + m * U + at))
                    x = tl.fma(far[m * V], d0, x)
                    if TANGENT:
                        h = tl.fma(gain[m * V], d0, before_a[m] + tl.load(b + m * U + at))
                    if V == 2:
                        d1 = tl.fma(c1, scale[m], -w[m * V + 1])
                        x = tl.fma(d1 * -1.0, d1, x)
                        x = tl.fma(far[m * V + 1], d1, x)
                        if TANGENT:
                            h = tl.fma(gain[m * V + 1], d1, h)
                    p = tl.exp2(x)
                    y = p
                    if TANGENT:
                        y = p * h
                        new_h = new_h + (h_of_u[m] + y,)
                    new_p = new_p + (p_of_u[m] + p,)
                    new_d = new_d + (tl.fma(y, d0, mass_d[m * V]),)
                    if V == 2:
                        new_d = new_d + (tl.fma(y, d1, mass_d[m * V + 1]),)
                    if ENTROPY:
                        new_x = new_x + (tl.fma(p, x, mass_x[m]),)
                    if CODEBOOK:
                        pull = factor[m] * tl.fma(grad_log_z[m], p, y)
                        sum0 += p * grad[m * V] - pull * (d0 - 0.5 * far[m * V])
                        if V == 2:
                            sum1 += p * grad[m * V + 1] - pull * (d1 - 0.5 * far[m * V + 1])
                p_of_u = new_p
                mass_d = new_d
                if TANGENT:
                    h_of_u = new_h
                if ENTROPY:
                    mass_x = new_x
                if CODEBOOK:
                    here = codebook_sum + c * U + u
                    tl.store(here, tl.load(here) + sum0)
                    if V == 2:
                        tl.store(here + R * U, tl.load(here + R * U) + sum1)
        new_mass = ()
        for m in tl.static_range(M):
            alive = p_of_u[m] > 0.0
            at = (u % RM) * ACROSS + u // RM
            message = (log2(p_of_u[m], FAST) - before[m]) - shift[m]
            message = tl.where(alive, message, IMPOSSIBLE)
            scatter(new_beta + m * U + at, message, FAST)
            new_mass = new_mass + (mass[m] + p_of_u[m],)
            if TANGENT:
                mean = _divide(h_of_u[m], p_of_u[m], FAST) - before_a[m]
                scatter(new_b + m * U + at, tl.where(alive, mean, 0.0), FAST)
        mass = new_mass
    total = ()
    total_d = ()
    total_x = ()
    for m in tl.static_range(M):
        total = total + (tl.sum(mass[m]),)
        if ENTROPY:
            total_x = total_x + (tl.sum(mass_x[m]),)
        for v in tl.static_range(V):
            total_d = total_d + (tl.sum(mass_d[m * V + v]),)
    return total, total_d, total_x
