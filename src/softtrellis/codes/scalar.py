"""Scalar quantization, as a code whose value depends on the newest bits of the state alone."""

from __future__ import annotations

import torch
from torch import Tensor

_LLOYD_ITERATIONS = 200


def lloyd_max(bits: int) -> Tensor:
    """float64 [2**bits]: the reproduction values of least squared error for N(0, 1).

    Lloyd's fixed point on the exact normal density; at 2 bits the error is 0.1175.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8, got {bits}")
    normal = torch.distributions.Normal(
        torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    )
    levels = normal.icdf((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(_LLOYD_ITERATIONS):
        inner = (levels[1:] + levels[:-1]) / 2
        edges = torch.cat([inner.new_tensor([-40.0]), inner, inner.new_tensor([40.0])])
        density, mass = normal.log_prob(edges).exp(), normal.cdf(edges)
        levels = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    result: Tensor = levels
    return result


def scalar(states: Tensor, bits: int) -> Tensor:
    """float32 [...]: the Lloyd-Max level that the last ``bits`` of int64 states [...] number.

    Every path through the trellis is one choice of levels, so Viterbi is rounding to the nearest
    level, and BCJR a softmax over the levels of each weight: the baseline that a trellis has to
    beat, with nothing else changed.
    """
    return lloyd_max(bits).to(states.device, torch.float32)[states & ((1 << bits) - 1)]
