"""Viterbi in Triton: messages every few steps, no backpointers.

A program takes a few tiles through all steps; the tiles share every read of the codebook. Messages
lie in the program's own scratch memory. The way back chooses again among the R**K paths of K steps
from one kept message to the next, with the arithmetic of the way there.
"""

# ruff: noqa: RUF005  (Triton's tuples grow by addition)
# mypy: disable-error-code="no-untyped-def, assignment, no-untyped-call, untyped-decorator"

from __future__ import annotations

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
    tiles_at_once,
    touch,
)

IMPOSSIBLE = tl.constexpr(1e30)
_SCRATCH_BYTES = 4 << 30
_PATHS_PER_HOP = 256


@triton.jit
def _slot(t, rest, KEEP: tl.constexpr):
    """Row of scratch for the message before step t: two spare rows, then the kept ones."""
    beyond = t - rest
    kept = 2 + rest + beyond // KEEP
    kept = tl.where(beyond < 0, 2 + t, kept)
    return tl.where((beyond > 0) & (beyond % KEEP != 0), t & 1, kept)


@triton.jit
def _error(c0, c1, w0, w1, before, V: tl.constexpr):
    d = c0 - w0
    cost = tl.fma(d, d, before)
    if V == 2:
        d = c1 - w1
        cost = tl.fma(d, d, cost)
    return cost


@triton.jit
def _step(
    codebook, source, target, w0, w1, turn,
    U: tl.constexpr, R: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """One step of M tiles: target(v) = min over c of source((c U + v) / R) + error.

    ``turn`` reverses the order of the blocks: taken forth and back by turns, the end of the
    codebook is still in the processor's cache.
    """
    if THREADS > 0:
        touch(source, M * U, THREADS)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    for i_block in range(U // (ROWS * COLUMNS)):
        j = tl.where(turn, U // (ROWS * COLUMNS) - 1 - i_block, i_block)
        rows = j * ROWS + row
        v = rows * COLUMNS + column
        best = ()
        for _ in tl.static_range(M):
            best = best + (tl.full([ROWS, COLUMNS], 3e38, tl.float32),)
        for chunk in range(R // CHOICES):
            for i in tl.static_range(CHOICES):
                c = chunk * CHOICES + i
                c0 = tl.load(codebook + c * U + v)
                c1 = c0
                if V == 2:
                    c1 = tl.load(codebook + (R * U + c * U) + v)
                found = ()
                for m in tl.static_range(M):
                    before = tl.load(source + m * U + (c * U + rows * COLUMNS) // R)
                    x = _error(c0, c1, w0[m], w1[m], before, V)
                    found = found + (tl.minimum(best[m], x),)
                best = found
        for m in tl.static_range(M):
            tl.store(target + m * U + v, best[m])


@triton.jit
def _hop(
    codebook, w, messages, states, t, overlap, tile, valid, N,
    U: tl.constexpr, R: tl.constexpr, V: tl.constexpr, STEPS: tl.constexpr, PATHS: tl.constexpr,
):  # fmt: skip
    """From the overlaps [M] before step t + STEPS back to those before step t; writes states."""
    path = tl.arange(0, PATHS)[None, :]
    u = overlap[:, None] + path * 0
    rest = path + overlap[:, None] * 0
    visited = ()
    for _ in tl.static_range(STEPS):
        s = (rest % R) * U + u
        rest = rest // R
        u = s // R
        visited = visited + (s,)
    cost = tl.load(messages[:, None] + u)
    for i in tl.static_range(STEPS):
        s = visited[STEPS - 1 - i]
        at = (w + (tile * N + (t + i)) * V)[:, None]
        c0, w0 = tl.load(codebook + s), tl.load(at)
        c1, w1 = c0, w0
        if V == 2:
            c1, w1 = tl.load(codebook + R * U + s), tl.load(at + 1)
        cost = _error(c0, c1, w0, w1, cost, V)
    choice = tl.argmin(cost, 1)
    u = overlap
    for i in tl.static_range(STEPS):
        s = (choice % R) * U + u
        choice = choice // R
        u = s // R
        tl.store(states + tile * N + (t + STEPS - 1 - i), s, mask=valid)
    return u


@triton.jit
def _viterbi(
    w, codebook, pins, states, scratch, count, batch, N, rows_of_tile,
    U: tl.constexpr, R: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
    KEEP: tl.constexpr, PATHS: tl.constexpr, SPAN: tl.constexpr, PINNED: tl.constexpr,
    THREADS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    if COUNTED:
        batch = tl.load(count)
    own = scratch + tl.program_id(0).to(tl.int64) * M * rows_of_tile * U
    span = tl.arange(0, SPAN)
    member = tl.arange(0, M)
    rest = N % KEEP
    group = tl.program_id(0)
    while group * M < batch:
        tile = tl.minimum(group * M + member, batch - 1).to(tl.int64)
        valid = group * M + member < batch
        first = own + 2 * M * U
        for m in tl.static_range(M):
            pin = 0
            if PINNED:
                pin = tl.load(pins + tl.minimum(group * M + m, batch - 1)).to(tl.int32)
            for j in range(U // SPAN):
                start = tl.zeros([SPAN], tl.float32)
                if PINNED:
                    start = tl.where(j * SPAN + span == pin, 0.0, IMPOSSIBLE)
                tl.store(first + m * U + j * SPAN + span, start)
        tl.debug_barrier()
        t = 0
        while t < N:
            here, there = _slot(t, rest, KEEP) * (M * U), _slot(t + 1, rest, KEEP) * (M * U)
            w0 = ()
            w1 = ()
            for m in tl.static_range(M):
                at = w + (tl.minimum(group * M + m, batch - 1).to(tl.int64) * N + t) * V
                w0 = w0 + (tl.load(at),)
                w1 = w1 + (tl.load(at + (V - 1)),)
            _step(
                codebook, own + here, own + there, w0, w1, t % 2 == 1,
                U, R, V, M, ROWS, COLUMNS, CHOICES, THREADS,
            )  # fmt: skip
            tl.debug_barrier()
            t += 1

        messages = own + member * U
        if PINNED:
            overlap = tl.load(pins + tile).to(tl.int32)
        else:
            last = messages + _slot(N, rest, KEEP) * (M * U)
            overlap = tl.zeros([M], tl.int32)
            least = tl.full([M], 3e38, tl.float32)
            for j in range(U // SPAN):
                cost = tl.load(last[:, None] + (j * SPAN + span)[None, :])
                low = tl.min(cost, 1)
                where = tl.argmin(cost, 1) + j * SPAN
                overlap = tl.where(low < least, where, overlap)
                least = tl.minimum(low, least)
        while t > rest:
            t -= KEEP
            row = messages + _slot(t, rest, KEEP) * (M * U)
            overlap = _hop(
                codebook, w, row, states, t, overlap, tile, valid, N, U, R, V, KEEP, PATHS
            )
        while t > 0:
            t -= 1
            row = messages + _slot(t, rest, KEEP) * (M * U)
            overlap = _hop(codebook, w, row, states, t, overlap, tile, valid, N, U, R, V, 1, R)
        tl.debug_barrier()
        group += tl.num_programs(0)


def default_launch(batch: int, spec: TrellisSpec, device: torch.device) -> Launch:
    """The launch that was fastest on an H100 (benchmarks/README.md)."""
    overlaps_per_thread = 4 if spec.V == 2 else 8
    warps = min(16, max(1, spec.num_overlaps // (32 * overlaps_per_thread)))
    return Launch(
        tiles=tiles_at_once(batch, 4 if spec.V == 2 or spec.L < 16 else 1, device),
        block=32 * overlaps_per_thread * warps,
        warps=warps,
        per_processor=16 // warps,
        registers=128,
        touch=spec.V == 2,
    )


def best_path(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    pins: Tensor | None,
    launch: Launch | None = None,
) -> Tensor:
    """The path of least squared error; ``viterbi_torch.best_path`` on a GPU.

    Args:
        w: float32 [B, N, V].
        codebook: float32 [S, V].
        spec: the trellis.
        pins: int64 [B], the overlap at both ends, or None for free ends.
        launch: how to cut the work; by default what suits the batch.

    Returns:
        int32 [B, N], the states.
    """
    states = torch.empty(*w.shape[:2], dtype=torch.int32, device=w.device)
    return fill(w, codebook, spec, pins, states, None, launch)


def fill(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    pins: Tensor | None,
    states: Tensor,
    tiles: Tensor | None,
    launch: Launch | None = None,
) -> Tensor:
    """``best_path`` into ``states``; only of the first ``tiles``, int32 [] on the device."""
    batch, steps, _ = w.shape
    if batch == 0:
        return states
    launch = launch or default_launch(batch, spec, w.device)
    keep = min(4, max(1, (_PATHS_PER_HOP.bit_length() - 1) // spec.shift))
    rows_of_tile = 2 + steps % keep + steps // keep + 1
    count = programs(batch, launch, w.device, 4 * rows_of_tile * spec.num_overlaps, _SCRATCH_BYTES)
    scratch = torch.empty(
        count * launch.tiles * rows_of_tile * spec.num_overlaps,
        dtype=torch.float32,
        device=w.device,
    )
    columns = forward_columns(spec)
    _viterbi[(count,)](
        w.contiguous(),
        planes(codebook),
        pins if pins is None else pins.contiguous(),
        states,
        scratch,
        tiles,
        batch,
        steps,
        rows_of_tile,
        U=spec.num_overlaps,
        R=spec.num_branches,
        V=spec.V,
        M=launch.tiles,
        ROWS=min(launch.block, spec.num_overlaps) // columns,
        COLUMNS=columns,
        CHOICES=min(spec.num_branches, launch.choices),
        KEEP=keep,
        PATHS=spec.num_branches**keep,
        SPAN=min(1024, spec.num_overlaps),
        PINNED=pins is not None,
        THREADS=launch.threads(w.device),
        COUNTED=tiles is not None,
        num_warps=launch.warps,
        maxnreg=launch.registers,
    )
    return states
