"""HYB: a hash into a small table of codewords, with a sign flip (V = 2)."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from softtrellis.spec import TrellisSpec

Flip = Literal["first", "second"]

TABLE_BITS = 9
TABLE_ROWS = 1 << TABLE_BITS
_SAMPLES = 1 << 15
_ITERATIONS = 25


def table_rows(states: Tensor) -> tuple[Tensor, Tensor]:
    """Table row int64 [...] and whether a sign flips, bool [...], of int64 states [...]."""
    h = states * states + states
    return (h >> (15 - TABLE_BITS)) & (TABLE_ROWS - 1), (h >> 15) & 1 == 1


def hybrid(states: Tensor, table: Tensor, flip: Flip) -> Tensor:
    """HYB (QTIP, algorithm 3): values [..., 2] of int64 states [...], differentiable in the table.

    Args:
        states: int64 [...].
        table: float [512, 2].
        flip: the component whose sign bit 15 of the hash flips; the QTIP paper and BCJR-QAT flip
            the second, QTIP's released checkpoints the first.
    """
    row, negative = table_rows(states)
    sign = torch.ones(*states.shape, 2, dtype=table.dtype, device=states.device)
    sign[..., 0 if flip == "first" else 1] = 1.0 - 2.0 * negative.to(table.dtype)
    return table[row] * sign


def table_of(codebook: Tensor, spec: TrellisSpec, flip: Flip) -> Tensor:
    """float32 [512, 2], the table that a codebook [2**L, 2] of "hyb" was made from.

    ``hybrid`` of it gives the codebook back; rows that no state has are zero.
    """
    row, negative = table_rows(torch.arange(spec.num_states, device=codebook.device))
    values = codebook.detach().to(torch.float32, copy=True)
    values[:, 0 if flip == "first" else 1] *= 1.0 - 2.0 * negative.to(torch.float32)
    table = values.new_zeros(TABLE_ROWS, 2)
    table[row] = values
    return table


@lru_cache(maxsize=8)
def trained_table(seed: int) -> np.ndarray:
    """float32 [512, 2]: k-means of N(0, I), the second component folded (QTIP, section 3.1.2).

    Lloyd's algorithm on 32,768 samples, 25 iterations. Its last bits depend on the machine.
    """
    samples = np.random.default_rng(seed).standard_normal((_SAMPLES, 2), dtype=np.float32)
    samples[:, 1] = np.abs(samples[:, 1])
    centroids = samples[:TABLE_ROWS].copy()
    for _ in range(_ITERATIONS):
        nearest = np.concatenate(
            [
                ((centroids**2).sum(1) - 2.0 * chunk @ centroids.T).argmin(1)
                for chunk in np.split(samples, _SAMPLES // 4096)
            ]
        )
        counts = np.bincount(nearest, minlength=TABLE_ROWS)
        for axis in range(2):
            sums = np.bincount(nearest, weights=samples[:, axis], minlength=TABLE_ROWS)
            centroids[:, axis] = np.where(
                counts > 0, sums / np.maximum(counts, 1), samples[0, axis]
            )
    return centroids


def default_table(seed: int, flip: Flip) -> Tensor:
    """float32 [512, 2]: ``trained_table``, folded over the component that is flipped.

    That of seed 0 is kept in ``hyb_table.npy``, the same on every machine. Checkpoints store their
    table, so that they do not depend on this function.
    """
    if seed == 0:
        with (files("softtrellis.codes") / "hyb_table.npy").open("rb") as file:
            table = torch.from_numpy(np.load(file))
    else:
        table = torch.from_numpy(trained_table(seed).copy())
    return table if flip == "second" else table.flip(1).contiguous()
