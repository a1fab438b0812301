# mypy: allow-untyped-decorators
"""Viterbi on the CPU (Numba); same signature as ``viterbi_torch``."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from softtrellis.spec import TrellisSpec
from softtrellis.trellis._overlaps_cpu import over_threads

_UNREACHABLE = np.float32(1e30)


def best_path(w: Tensor, codebook: Tensor, spec: TrellisSpec, pins: Tensor | None) -> Tensor:
    """The path of least squared error; see ``viterbi_torch.best_path``. float32 on the CPU only."""
    R, U = spec.num_branches, spec.num_overlaps
    W, Rc = max(U // R, 1), min(R, U)
    # [V, R, Rc, W]: oldest symbol, then the overlap led to as (newest symbol, rest)
    code = codebook.reshape(R, W, Rc, spec.V).permute(3, 0, 2, 1).contiguous().numpy()
    tiles = w.contiguous().numpy()
    states = np.empty(w.shape[:2], np.int32)
    ends = np.full(w.shape[0], -1) if pins is None else pins.numpy().astype(np.int64)
    over_threads(
        w.shape[0],
        lambda first, stride: _best_paths(first, stride, tiles, code, spec.shift, ends, states),
    )
    return torch.from_numpy(states)


@njit(nogil=True, error_model="numpy", cache=True)
def _best_paths(first, stride, tiles, code, shift, ends, states):  # type: ignore[no-untyped-def]
    V, R, Rc, W = code.shape
    U, N = Rc * W, tiles.shape[1]
    message, best, choice = np.empty(U, np.float32), np.empty(W, np.float32), np.empty(W, np.float32)
    following = np.empty(U, np.float32)
    back = np.empty((N, U), np.uint8)
    for tile in range(first, tiles.shape[0], stride):
        pin = ends[tile]
        message[:] = np.float32(0.0) if pin < 0 else _UNREACHABLE
        if pin >= 0:
            message[pin] = np.float32(0.0)
        for t in range(N):
            w0, w1 = tiles[tile, t, 0], tiles[tile, t, V - 1]
            least = np.float32(np.inf)
            for c in range(Rc):
                best[:] = np.float32(np.inf)
                for r in range(R):
                    base = (r * U + c) >> shift
                    row0, row1, r32 = code[0, r, c], code[V - 1, r, c], np.float32(r)
                    source = message[base : base + W]
                    if V == 2:
                        for j in range(W):
                            d0, d1 = row0[j] - w0, row1[j] - w1
                            x = source[j] + (d0 * d0 + d1 * d1)
                            choice[j] = r32 if x < best[j] else choice[j]
                            best[j] = min(x, best[j])
                    else:
                        for j in range(W):
                            d0 = row0[j] - w0
                            x = source[j] + d0 * d0
                            choice[j] = r32 if x < best[j] else choice[j]
                            best[j] = min(x, best[j])
                for j in range(W):
                    following[j * Rc + c] = best[j]
                    back[t, j * Rc + c] = np.uint8(choice[j])
                    least = min(least, best[j])
            for u in range(U):
                message[u] = following[u] - least
        overlap = np.argmin(message) if pin < 0 else pin
        for t in range(N - 1, -1, -1):
            state = back[t, overlap] * U + overlap
            states[tile, t] = state
            overlap = state >> shift
