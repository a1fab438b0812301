# mypy: allow-untyped-decorators
"""What the CPU kernels of Viterbi and BCJR share: the order of the lanes, and the threads.

A message has one entry per overlap. Both directions of the trellis become the same vector loop
over R candidates, ``message[r][i] - energy(code[r][i])``, with neighbouring lanes i:

- forward, state s = a U + v with a = r the oldest symbol. Lane i stands for the overlap
  v = j Rc + c that the state leads to, i = c W + j, where W = max(U / R, 1), Rc = min(R, U). The
  message comes from the overlap (s >> kV) = a W + j: in natural order, neighbours.
- backward, state s = u R + c with c = r the newest symbol. Lane i is the overlap u = i. The message
  comes from the overlap (s mod U), which is j R + c for j = u mod W: neighbours, once the natural
  order [j][c] is transposed to [c][j].

So every step transposes one message: U entries, against the S = U R states of the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from softtrellis.spec import TrellisSpec
from softtrellis.trellis._numba_math import (
    LANES,
    evens,
    load,
    odds,
    splat,
    store,
    zip_high,
    zip_low,
)

UNREACHABLE = np.float32(-1e30)
"""The logarithm of no path: finite, so that differences of it are no NaN."""

_FAR = 1e8
"""What the lanes past U emit, in trellises of fewer overlaps than lanes: they weigh nothing."""

_CHUNK_VECTORS = 64

Floats = NDArray[np.float32]

entry = njit(nogil=True, error_model="numpy", cache=True)
kernel = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
inlined = njit(
    nogil=True,
    error_model="numpy",
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    forceinline=True,
)


class Shape(NamedTuple):
    """The sizes that the kernels need; all but ``shift`` and ``chunk`` named as in the module.

    ``width`` is U rounded up to whole vectors, ``period`` the length of a row of a transposed
    message and ``chunk`` the number of vectors of lanes whose candidates are kept in cache.
    """

    N: int
    R: int
    U: int
    W: int
    shift: int
    width: int
    period: int
    chunk: int


def shape_of(spec: TrellisSpec, steps: int) -> Shape:
    R, U = spec.num_branches, spec.num_overlaps
    W, width = max(U // R, 1), max(U, LANES)
    chunk = min(width // LANES, max(1, _CHUNK_VECTORS // R))
    return Shape(steps, R, U, W, spec.shift, width, max(W, LANES), chunk)


def forward_code(codebook: Tensor, spec: TrellisSpec) -> Tensor:
    """float32 [S, V] codebook in the order of the forward loop, see ``_blocks``."""
    shape = shape_of(spec, 1)
    lane = torch.arange(shape.U)
    target = lane % shape.W * min(shape.R, shape.U) + lane // shape.W
    return _blocks(codebook, torch.arange(shape.R).unsqueeze(1) * shape.U + target, shape)


def backward_code(codebook: Tensor, spec: TrellisSpec) -> Tensor:
    """float32 [S, V] codebook in the order of the backward loop, see ``_blocks``."""
    shape = shape_of(spec, 1)
    states = torch.arange(shape.U) * shape.R + torch.arange(shape.R).unsqueeze(1)
    return _blocks(codebook, states, shape)


def states_of_blocks(blocks: Tensor, spec: TrellisSpec) -> Tensor:
    """Undoes ``backward_code``: [S, V] of one value per state and component."""
    shape = shape_of(spec, 1)
    rows = blocks.reshape(shape.width // LANES, shape.R, spec.V, LANES).permute(0, 3, 1, 2)
    return rows.reshape(shape.width, shape.R, spec.V)[: shape.U].reshape(spec.num_states, spec.V)


def _blocks(codebook: Tensor, states: Tensor, shape: Shape) -> Tensor:
    """[U / LANES, R, V, LANES], flat, of states [R, U]: one block is one run of memory."""
    code = codebook.new_full((shape.R, shape.width, codebook.shape[1]), _FAR)
    code[:, : shape.U] = codebook[states]
    code = code.reshape(shape.R, shape.width // LANES, LANES, -1).permute(1, 0, 3, 2)
    return code.contiguous().view(-1)


def as_array(x: Tensor) -> Floats:
    """The flat contents of a float32 CPU tensor; ValueError for any other."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(
            f"the CPU backend takes float32 tensors on the CPU, got {x.dtype} on {x.device}; "
            "convert them or use backend='torch'"
        )
    flat: Floats = x.detach().contiguous().view(-1).numpy()
    return flat


def pins_or_free(pins: Tensor | None, tiles: int) -> NDArray[np.int64]:
    """int64 [B]: the overlap at both ends, or -1 for free ends."""
    if pins is None:
        return np.full(tiles, -1, np.int64)
    ends: NDArray[np.int64] = pins.to(torch.int64).contiguous().numpy()
    return ends


def over_threads(tiles: int, run: Callable[[int, int], Any]) -> list[Any]:
    """``run(first, stride)`` for every thread, which takes tiles first, first + stride, ..."""
    threads = max(1, min(torch.get_num_threads(), tiles))
    if threads == 1:
        return [run(0, 1)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads), [threads] * threads))


@kernel
def end_message(message: Floats, shape: Shape, pin: int) -> None:
    """The message at either end: every overlap alike, or only one (pin >= 0)."""
    for u in range(shape.width):
        message[u] = 0.0 if u == pin or (pin < 0 and u < shape.U) else UNREACHABLE


@inlined
def spread_rows(message: Floats, row: int, rows: Floats, shape: Shape) -> None:
    """Rows [a][period] for the forward loop, where those of a message are shorter than a vector."""
    for a in range(shape.R):
        for j in range(LANES):
            u = ((a * shape.U) >> shape.shift) + j % shape.W
            rows[a * LANES + j] = message[row + u]


@kernel
def from_lanes(
    source: Floats, target: Floats, row: int, spare: Floats, shape: Shape, offset: Any
) -> None:
    """The forward loop's lanes [c][j], minus offset, to natural order [j][c] in a row of target.

    Rotates the bits of the index left by kV, two at a time; ``source`` and ``spare`` are lost.
    """
    U = shape.U
    if shape.W < LANES:
        for i in range(U):
            v = i % shape.W * min(shape.R, U) + i // shape.W
            target[row + v] = source[i] - offset
        return
    bits = shape.shift
    while bits > 0:
        last = bits <= 2
        to, at = (target, row) if last else (spare, 0)
        less = splat(offset if last else offset * 0)
        if bits == 1:
            for j in range(0, U // 2, LANES):
                x, y = load(source, j), load(source, U // 2 + j)
                store(to, at + 2 * j, zip_low(x, y) - less)
                store(to, at + 2 * j + LANES, zip_high(x, y) - less)
        else:
            quarter = U // 4
            for j in range(0, quarter, LANES):
                x0, x1 = load(source, j), load(source, quarter + j)
                x2, x3 = load(source, 2 * quarter + j), load(source, 3 * quarter + j)
                even, odd = zip_low(x0, x2), zip_low(x1, x3)
                store(to, at + 4 * j, zip_low(even, odd) - less)
                store(to, at + 4 * j + LANES, zip_high(even, odd) - less)
                even, odd = zip_high(x0, x2), zip_high(x1, x3)
                store(to, at + 4 * j + 2 * LANES, zip_low(even, odd) - less)
                store(to, at + 4 * j + 3 * LANES, zip_high(even, odd) - less)
        source, spare = spare, source
        bits -= 2


@kernel
def transposed(source: Floats, target: Floats, spare: Floats, shape: Shape, offset: Any) -> None:
    """Natural order [j][c], minus offset, to rows [c][period] for the backward loop.

    Rotates the bits of the index right by kV, two at a time; ``source`` and ``spare`` are lost.
    """
    U = shape.U
    if shape.W < LANES:
        for c in range(shape.R):
            for j in range(LANES):
                target[c * LANES + j] = source[(j * shape.R + c) % U] - offset
        return
    bits = shape.shift
    while bits > 0:
        last = bits <= 2
        to = target if last else spare
        less = splat(offset if last else offset * 0)
        if bits == 1:
            for j in range(0, U // 2, LANES):
                x, y = load(source, 2 * j), load(source, 2 * j + LANES)
                store(to, j, evens(x, y) - less)
                store(to, U // 2 + j, odds(x, y) - less)
        else:
            quarter = U // 4
            for j in range(0, quarter, LANES):
                x0, x1 = load(source, 4 * j), load(source, 4 * j + LANES)
                x2, x3 = (load(source, 4 * j + 2 * LANES), load(source, 4 * j + 3 * LANES))
                x, y = evens(x0, x1), evens(x2, x3)
                store(to, j, evens(x, y) - less)
                store(to, 2 * quarter + j, odds(x, y) - less)
                x, y = odds(x0, x1), odds(x2, x3)
                store(to, quarter + j, evens(x, y) - less)
                store(to, 3 * quarter + j, odds(x, y) - less)
        source, spare = spare, source
        bits -= 2
