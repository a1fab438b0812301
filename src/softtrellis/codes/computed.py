"""Codes computed from the state by a hash: 1MAD, 3INST, and EXL3's mcg and mul1 (V = 1)."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _multiply_add(states: Tensor, multiplier: int, increment: int) -> Tensor:
    """``(multiplier * states + increment) mod 2**32`` in int64, for 16-bit states."""
    return (states * multiplier + increment) & _MASK32


def _byte_sum(h: Tensor) -> Tensor:
    return (h & 255) + ((h >> 8) & 255) + ((h >> 16) & 255) + (h >> 24)


def _half_from_bits(bits: Tensor) -> Tensor:
    """float16 [...] from int64 [...] holding 16 bits."""
    signed = torch.where(bits >= 1 << 15, bits - (1 << 16), bits)
    return signed.to(torch.int16).view(torch.float16)


def one_mad(states: Tensor) -> Tensor:
    """1MAD (QTIP, section 3.1.1): float32 values [...] of int64 states [...]."""
    h = _multiply_add(states, 34038481, 76625530)
    return (_byte_sum(h) - 510).to(torch.float32) / 147.800537109375


def _sum_of_masked_halves(h: Tensor) -> Tensor:
    masked = (h & 0x8FFF8FFF) ^ 0x3B603B60
    return (_half_from_bits(masked >> 16) + _half_from_bits(masked & 0xFFFF)).to(torch.float32)


def three_inst(states: Tensor) -> Tensor:
    """3INST (QTIP, section 3.1.1): float32 values [...] of int64 states [...]."""
    return _sum_of_masked_halves(_multiply_add(states, 89226354, 64248484))


def mcg(states: Tensor) -> Tensor:
    """EXL3's mcg, 3INST behind another hash: float32 values [...] of int64 states [...]."""
    return _sum_of_masked_halves(_multiply_add(states, 0xCBAC1FED, 0))


def mul1(states: Tensor) -> Tensor:
    """EXL3's mul1: float32 values [...] of int64 states [...].

    One fp16 fused multiply-add of the hash's byte sum; the product and sum are exact in float64,
    so the conversion to fp16 is its only rounding.
    """
    total = _half_from_bits(0x6400 + _byte_sum(_multiply_add(states, 0x83DCD12D, 0)))
    factor, offset = _half_from_bits(torch.tensor([0x1EEE, 0xC931], device=states.device)).double()
    values: Tensor = (total.double() * factor + offset).to(torch.float16).to(torch.float32)
    return values
