"""BCJR in Triton: one program takes a few tiles through both sweeps, forward and exact backward.

Scratch memory belongs to the program, not to the tile, so that it does not grow with the batch:
all alpha messages of the tiles in hand (with their tangents in the backward pass) and two beta
messages. The steps themselves are in ``sweeps_triton``.
"""

# ruff: noqa: RUF005  (Triton's tuples grow by addition)
# mypy: disable-error-code="no-untyped-def, assignment, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtrellis.spec import TrellisSpec
from softtrellis.trellis.launch_triton import (
    Launch,
    forward_columns,
    planes,
    programs,
    successor_planes,
    tiles_at_once,
)
from softtrellis.trellis.sweeps_triton import IMPOSSIBLE, alpha_step, beta_step, near_of

_SCRATCH_BYTES = {1: 5 << 30, 2: 2 << 30}
_CHOICES = 16
_LOG2E = 1.0 / math.log(2.0)
_LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _sweeps(
    w, codebook, successors, bounds, scales, pins, values, log_z, entropy,
    grad_values, grad_log_z, grad_w, codebook_sums, scratch, shifts, rows, count, batch, N,
    U: tl.constexpr, R: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
    BETA_ROWS: tl.constexpr, BETA_COLUMNS: tl.constexpr, BETA_CHOICES: tl.constexpr,
    SPAN: tl.constexpr, PINNED: tl.constexpr, TANGENT: tl.constexpr, ENTROPY: tl.constexpr,
    CODEBOOK: tl.constexpr, FAST: tl.constexpr, THREADS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Both sweeps over groups of M tiles; values and log_z, or with TANGENT their gradients.

    scratch holds per program [N + 3, 1 or 2, M, U]: alpha_0 to alpha_N and two betas, each with its
    tangent where there is one. shifts is [programs, M, N]. With CHOSEN the tiles are only those of
    the first ``count`` entries of ``rows``.
    """
    ACROSS: tl.constexpr = U // R if R < U else 1
    RM: tl.constexpr = U // ACROSS
    FIELDS: tl.constexpr = 2 if TANGENT else 1
    if CHOSEN:
        batch = tl.load(count)
    program = tl.program_id(0).to(tl.int64)
    ROW: tl.constexpr = FIELDS * M * U
    own = scratch + program * (N + 3) * ROW
    own_shifts = shifts + program * M * N
    own_sum = codebook_sums
    if CODEBOOK:
        own_sum = codebook_sums + program * V * R * U
    low = ()
    high = ()
    for v in tl.static_range(V):
        low = low + (tl.load(bounds + v),)
        high = high + (tl.load(bounds + V + v),)
    span = tl.arange(0, SPAN)
    group = tl.program_id(0)
    while group * M < batch:
        tile = ()
        pin = ()
        scale = ()
        shift = ()
        grad_z = ()
        factor = ()
        for m in tl.static_range(M):
            index = tl.minimum(group * M + m, batch - 1).to(tl.int64)
            if CHOSEN:
                index = tl.load(rows + index).to(tl.int64)
            tile = tile + (index,)
            scale = scale + (tl.load(scales + index),)
            shift = shift + (0.0,)
            place = 0
            if PINNED:
                place = tl.load(pins + index).to(tl.int32)
            pin = pin + (place,)
            if CODEBOOK:
                counts = tl.where(group * M + m < batch, 1.0, 0.0)
                grad_z = grad_z + (tl.load(grad_log_z + index),)
                factor = factor + (counts * 2.0 * _LN2 * tl.load(scales + index),)
            for j in range(U // SPAN):
                u = j * SPAN + span
                start = tl.zeros([SPAN], tl.float32)
                if PINNED:
                    start = tl.where(u == place, 0.0, IMPOSSIBLE)
                tl.store(own + m * U + u, start)
                if TANGENT:
                    tl.store(own + (M + m) * U + u, tl.zeros([SPAN], tl.float32))
        tl.debug_barrier()

        t = 0
        while t < N:
            alpha = own + t * ROW
            x = ()
            far = ()
            gain = ()
            for m in tl.static_range(M):
                tl.store(own_shifts + m * N + t, shift[m])
                for v in tl.static_range(V):
                    entry = (tile[m] * N + t) * V + v
                    weight = tl.load(w + entry)
                    near = near_of(weight, values + entry, low[v], high[v], TANGENT)
                    x = x + (near * scale[m],)
                    far = far + (2.0 * (weight - near) * scale[m],)
                    if TANGENT:
                        gain = gain + (tl.load(grad_values + entry) / scale[m],)
            shift = alpha_step(
                codebook, alpha, alpha + M * U, alpha + ROW, alpha + ROW + M * U,
                x, far, gain, scale, shift, t % 2 == 1,
                U, R, V, M, ROWS, COLUMNS, CHOICES, TANGENT, FAST, THREADS,
            )  # fmt: skip
            tl.debug_barrier()
            t += 1

        total = ()
        for m in tl.static_range(M):
            last = own + N * ROW + m * U
            drift = 0.0
            if PINNED:
                log2_z = tl.load(last + pin[m])
                if TANGENT:
                    drift = tl.load(last + M * U + pin[m])
            else:
                mass = tl.zeros([SPAN], tl.float32)
                mass_a = tl.zeros([SPAN], tl.float32)
                for j in range(U // SPAN):
                    p = tl.exp2(tl.load(last + j * SPAN + span) - shift[m])
                    mass += p
                    if TANGENT:
                        mass_a += p * tl.load(last + M * U + j * SPAN + span)
                log2_z = shift[m] + tl.log2(tl.sum(mass))
                drift = tl.sum(mass_a) / tl.sum(mass)
            for j in range(U // SPAN):
                position = j * SPAN + span
                end = tl.zeros([SPAN], tl.float32) - log2_z
                if PINNED:
                    u = (position % ACROSS) * RM + position // ACROSS
                    end = tl.where(u == pin[m], end, IMPOSSIBLE)
                tl.store(last + ROW + position, end)
                if TANGENT:  # the mean of G, 0 where the values are the average, is taken off
                    b_end = tl.zeros([SPAN], tl.float32) - drift
                    tl.store(last + ROW + M * U + position, b_end)
            if not TANGENT:
                whole = log2_z.to(tl.float64)
                i = 0
                while i < N:
                    whole += tl.load(own_shifts + m * N + i).to(tl.float64)
                    for v in tl.static_range(V):
                        weight = tl.load(w + (tile[m] * N + i) * V + v)
                        rest = weight - tl.minimum(tl.maximum(weight, low[v]), high[v])
                        whole -= (rest * scale[m] * rest * scale[m]).to(tl.float64)
                    i += 1
                tl.store(log_z + tile[m], (whole * _LN2).to(tl.float32))
            total = total + (1.0,)
        tl.debug_barrier()

        slot = 0
        while t > 0:
            t -= 1
            alpha = own + t * ROW
            beta = own + (N + 1 + slot) * ROW
            new_beta = own + (N + 2 - slot) * ROW
            x = ()
            far = ()
            gain = ()
            grad = ()
            shift = ()
            for m in tl.static_range(M):
                shift = shift + (tl.load(own_shifts + m * N + t) + tl.log2(total[m]),)
                for v in tl.static_range(V):
                    entry = (tile[m] * N + t) * V + v
                    weight = tl.load(w + entry)
                    near = near_of(weight, values + entry, low[v], high[v], TANGENT)
                    x = x + (near * scale[m],)
                    far = far + (2.0 * (weight - near) * scale[m],)
                    if TANGENT:
                        g = tl.load(grad_values + entry)
                        gain = gain + (g / scale[m],)
                        if CODEBOOK:
                            counts = tl.where(group * M + m < batch, 1.0, 0.0)
                            grad = grad + (g * counts,)
            total, total_d, total_x = beta_step(
                successors, alpha, beta, alpha + M * U, beta + M * U, new_beta, new_beta + M * U,
                x, far, gain, scale, shift, slot == 1, own_sum, grad, grad_z, factor,
                U, R, V, M, BETA_ROWS, BETA_COLUMNS, BETA_CHOICES, TANGENT, ENTROPY, CODEBOOK,
                FAST, THREADS,
            )  # fmt: skip
            for m in tl.static_range(M):
                step = tile[m] * N + t
                for v in tl.static_range(V):
                    mean = total_d[m * V + v] / (total[m] * scale[m])
                    weight = tl.load(w + step * V + v)
                    near = near_of(weight, values + step * V + v, low[v], high[v], TANGENT)
                    if TANGENT:
                        mean += (near - weight) * tl.load(grad_log_z + tile[m])
                        factor_w = 2.0 * _LN2 * scale[m] * scale[m]
                        tl.store(grad_w + step * V + v, mean * factor_w)
                    else:
                        tl.store(values + step * V + v, mean + near)
                if ENTROPY:
                    log2_p = total_x[m] / total[m] - tl.log2(total[m])
                    tl.store(entropy + step, -log2_p * _LN2)
            slot = 1 - slot
            tl.debug_barrier()
        group += tl.num_programs(0)


def default_launch(batch: int, spec: TrellisSpec, device: torch.device, *, tangent: bool) -> Launch:
    """The launch that was fastest on an H100 (benchmarks/README.md): 16 warps a multiprocessor."""
    if spec.V == 1 and spec.L == 16:
        if tangent:
            return Launch(1, 2048, 16, 1, registers=128, choices=4, beta_block=2048)
        return Launch(1, 2048, 16, 2, registers=64, choices=4, beta_block=2048)
    warps = min(16, max(1, spec.num_overlaps // 64))
    return Launch(
        tiles=tiles_at_once(batch, 2 if tangent else 4, device),
        block=64 * warps,
        warps=warps,
        per_processor=16 // warps,
        registers=128,
        choices=8,
        beta_block=64 * warps,
    )


def sweep(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    pins: Tensor | None,
    values: Tensor,
    *,
    log_z: Tensor | None = None,
    entropy: Tensor | None = None,
    grad_values: Tensor | None = None,
    grad_log_z: Tensor | None = None,
    grad_w: Tensor | None = None,
    with_codebook: bool = False,
    chosen: tuple[Tensor, Tensor] | None = None,
    launch: Launch | None = None,
) -> Tensor | None:
    """Launches the sweeps; returns the codebook's gradient [S, V] where it was asked for.

    ``chosen`` restricts them to some tiles: their indices, int32 [B], and how many of these count,
    int32 [], both on the device.
    """
    batch, steps, _ = w.shape
    device, tangent = w.device, grad_values is not None
    if tangent and grad_log_z is None:
        grad_log_z = torch.zeros_like(temperature)
    launch = launch or default_launch(1 if chosen else batch, spec, device, tangent=tangent)
    states, overlaps, branches = spec.num_states, spec.num_overlaps, spec.num_branches
    fields = 2 if tangent else 1
    bytes_per_tile = 4 * (fields * (steps + 3) * overlaps + steps)
    count = programs(batch, launch, device, bytes_per_tile, _SCRATCH_BYTES[spec.V])
    floats = count * launch.tiles * fields * (steps + 3) * overlaps
    scratch = torch.empty(floats, dtype=torch.float32, device=device)
    shifts = torch.empty(count * launch.tiles * steps, dtype=torch.float32, device=device)
    sums = torch.zeros(count, spec.V, states, device=device) if with_codebook else None
    columns = forward_columns(spec)
    across = overlaps // columns
    beta_columns = min(across, 128, launch.beta_block)
    _sweeps[(count,)](
        w.contiguous(),
        planes(codebook),
        successor_planes(codebook, spec),
        torch.stack([codebook.amin(0), codebook.amax(0)]).float(),
        (_LOG2E / temperature.double()).sqrt().float(),
        None if pins is None else pins.contiguous(),
        values,
        log_z,
        entropy,
        None if grad_values is None else grad_values.contiguous(),
        None if grad_log_z is None else grad_log_z.contiguous(),
        grad_w,
        sums,
        scratch,
        shifts,
        *(chosen or (None, None)),
        batch,
        steps,
        U=overlaps,
        R=branches,
        V=spec.V,
        M=launch.tiles,
        ROWS=min(launch.block, overlaps) // columns,
        COLUMNS=columns,
        CHOICES=min(branches, launch.choices),
        BETA_ROWS=min(max(1, launch.beta_block // beta_columns), columns),
        BETA_COLUMNS=beta_columns,
        BETA_CHOICES=min(branches, _CHOICES),
        SPAN=min(1024, overlaps),
        PINNED=pins is not None,
        TANGENT=tangent,
        ENTROPY=entropy is not None,
        CODEBOOK=with_codebook,
        FAST=w.is_cuda,
        THREADS=launch.threads(device),
        CHOSEN=chosen is not None,
        num_warps=launch.warps,
        maxnreg=launch.registers,
    )
    if sums is None:
        return None
    total = sums.sum(0, dtype=torch.float64).float()
    return total.reshape(spec.V, branches, overlaps).permute(2, 1, 0).reshape(states, spec.V)


def soft_forward(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    pins: Tensor | None,
    with_entropy: bool,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The soft codeword; ``bcjr_torch.soft_forward`` on a GPU.

    Args:
        w, codebook, spec, temperature, pins, with_entropy: as there, tensors in float32.
        launch: how to cut the work; by default what suits the batch.

    Returns:
        values [B, N, V], log_z [B] in nats, entropy [B, N] in nats over states or None.
    """
    values = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    log_z = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
    entropy = None
    if with_entropy:
        entropy = torch.empty(w.shape[:2], dtype=torch.float32, device=w.device)
    if w.shape[0]:
        sweep(
            w,
            codebook,
            spec,
            temperature,
            pins,
            values,
            log_z=log_z,
            entropy=entropy,
            launch=launch,
        )
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
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The exact gradient of ``soft_forward``; ``bcjr_torch.soft_backward`` on a GPU.

    Args:
        w, codebook, spec, temperature, pins, values, grad_values, grad_log_z, with_codebook: as
            there, tensors in float32.
        launch: how to cut the work; by default what suits the batch.

    Returns:
        grad_w [B, N, V], grad_codebook [S, V] or None.
    """
    grad_w = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    if w.shape[0] == 0:
        return grad_w, torch.zeros_like(codebook) if with_codebook else None
    grad_codebook = sweep(
        w,
        codebook,
        spec,
        temperature,
        pins,
        values.contiguous(),
        grad_values=grad_values,
        grad_log_z=grad_log_z,
        grad_w=grad_w,
        with_codebook=with_codebook,
        launch=launch,
    )
    return grad_w, grad_codebook
