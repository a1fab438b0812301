"""The codebooks in the forms in which the CUDA kernels read them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from softtrellis.codes.hybrid import TABLE_ROWS, table_rows

_MANTISSAS = (1 << 10, 1 << 11)
_ROUNDING = 2.0**-22


def _a_state_of_each_row(states: Tensor, device: torch.device) -> Tensor:
    found = torch.empty(TABLE_ROWS, dtype=torch.int64)
    found[table_rows(states)[0]] = states
    return found.to(device=device, dtype=torch.int32)


@cache
def states_of_rows(device: torch.device) -> Tensor:
    """int32 [512]: for every row of HYB's table, a state whose bits 11 and 15 are 0."""
    states = torch.arange(1 << 15)
    return _a_state_of_each_row(states[(states >> 11) & 1 == 0], device)


@cache
def short_states_of_rows(device: torch.device) -> Tensor:
    """int32 [512]: for every row of HYB's table, a state of 12 bits."""
    return _a_state_of_each_row(torch.arange(1 << 12), device)


def scaled_halves(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """A codebook of float16 numbers times one factor, as 1MAD, 3INST, mcg and mul1 are.

    The greatest value fixes the factor up to its float16 mantissa; the 1024 mantissas are tried.

    Args:
        codebook: float32 [S, 1].

    Returns:
        float16 [S] and the factor, float32 []; their product is the codebook to float32 rounding.
        The factor is 0 where there is none.
    """
    values = codebook.flatten().double()
    mantissas = torch.arange(*_MANTISSAS, dtype=torch.float64, device=values.device)
    factors = values.abs().amax() / mantissas
    sample = values[:: max(1, values.numel() // 512)]
    near = (sample / factors[:, None]).half().double() * factors[:, None]
    fits = (near - sample).abs() <= _ROUNDING * sample.abs()
    factor = factors.take(fits.sum(1).argmax())
    halves = (values / factor).half()
    exact = ((halves.double() * factor - values).abs() <= _ROUNDING * values.abs()).all()
    return halves, torch.where(exact, factor, torch.zeros_like(factor)).float()
