"""How fast a GPU computes what every sweep must: chains of one operation in registers."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK, UNROLL, WARPS = 1024, 8, 4


@triton.jit
def _exponentials(x, rounds, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    for _round in range(rounds):
        for _step in tl.static_range(UNROLL):
            value = tl.exp2(value * -1.0)  # the sign keeps the chain between 0 and 1
    tl.store(x + at, value)


@triton.jit
def _additions(x, y, rounds, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    other = tl.load(y + at)
    for _round in range(rounds):
        for _step in tl.static_range(UNROLL):
            value = tl.minimum(value + other, other)
    tl.store(x + at, value)


def exponentials(x: Tensor, rounds: int) -> int:
    """Replaces x by exp2(-x), ``UNROLL * rounds`` times over.

    Args:
        x: float32 [P * BLOCK], contiguous; every BLOCK values are one program's.
        rounds: turns of the loop inside the kernel.

    Returns:
        How many exponentials that were.
    """
    _exponentials[(x.numel() // BLOCK,)](x, rounds, BLOCK, UNROLL, num_warps=WARPS)
    return x.numel() * rounds * UNROLL


def additions(x: Tensor, y: Tensor, rounds: int) -> int:
    """Replaces x by min(x + y, y), ``UNROLL * rounds`` times over.

    Args:
        x, y: float32 [P * BLOCK], contiguous; every BLOCK values are one program's.
        rounds: turns of the loop inside the kernel.

    Returns:
        How many pairs of an addition and a minimum that were.
    """
    _additions[(x.numel() // BLOCK,)](x, y, rounds, BLOCK, UNROLL, num_warps=WARPS)
    return x.numel() * rounds * UNROLL
