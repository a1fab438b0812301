"""Products with packed weights in CUDA C++: ``trellis/cuda/decode.cu``.

For the two profiles at L = 16 and k = 2: HYB in the order "rows" and mul1 in EXL3's order. All else
is left to ``decode_triton``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from softtrellis.quantizers.hard import TrellisCode
from softtrellis.trellis.launch_cuda import Kernel, multiprocessors

MAX_SHARED_BYTES = 227 * 1024
_MORE_THAN_HALF = 115 * 1024
_STRIP, _UNIT_INPUTS, _UNIT_BYTES = 32, 128, 1024
_TABLE_ROWS = 1024
_LEAST_UNITS = 4  # of a block: one for each scheduler of a multiprocessor


@dataclass(frozen=True)
class Variant:
    """A kernel of ``decode.cu`` and what its template's parameters are.

    Attributes:
        kernel: the kernel itself.
        rows: most rows of activations that it takes.
        stages: units of work whose codes a warp copies ahead.
        copies: of HYB's table; 0 for codes without one.
        shared_x: whether each block copies all activations to its shared memory.
    """

    kernel: Kernel
    rows: int
    stages: int
    copies: int
    shared_x: bool = False

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.kernel.threads // 32

    def shared_bytes(self, batch: int, inputs: int) -> int:
        """Dynamic shared memory of a block: the table, x, each warp's sums of a strip and copies.

        The sums of a warp's second strip take the place of its copies. It is more than half of what
        a multiprocessor has, as two blocks on one, and none on another, would take twice as long.
        """
        x_row = -(-inputs // _UNIT_INPUTS) * 2 * _UNIT_INPUTS + 16
        size = 4 * _TABLE_ROWS * self.copies + (batch * x_row if self.shared_x else 0)
        size += self.warps * (4 * _STRIP * batch + self.stages * _UNIT_BYTES)
        return max(size, _MORE_THAN_HALF)

    def takes(self, batch: int, inputs: int) -> bool:
        """Whether it can multiply so many rows of so many inputs."""
        return batch <= self.rows and self.shared_bytes(batch, inputs) <= MAX_SHARED_BYTES


@dataclass(frozen=True)
class Deal:
    """Units of work, inputs first, as dealt to a grid of blocks.

    Attributes:
        grid: blocks.
        least: units of a block.
        more: how many blocks, the first ones, have one more.
        shares: most blocks that work for one strip of outputs.
    """

    grid: int
    least: int
    more: int
    shares: int

    @classmethod
    @lru_cache(maxsize=1024)
    def of(cls, out: int, inputs: int, warps: int, processors: int) -> Deal:
        """How a product is dealt to so many multiprocessors, with so many warps each.

        A warp gets at most one strip's number of units, as it has room for the sums of two.
        """
        strips, row = -(-out // _STRIP), -(-inputs // _UNIT_INPUTS)
        units = strips * row
        grid = min(processors, -(-units // _LEAST_UNITS))
        grid = max(grid, -(-strips // warps))
        least, more = divmod(units, grid)

        def block_of(unit: int) -> int:
            large = more * (least + 1)
            return unit // (least + 1) if unit < large else more + (unit - large) // least

        shares = max(
            block_of(first + row - 1) - block_of(first) + 1 for first in range(0, units, row)
        )
        return cls(grid, least, more, shares)


VARIANTS = {
    ("hyb", "rows"): [
        Variant(Kernel("decode.cu", "hyb_rows_8", 512), 8, 2, 32),
        Variant(Kernel("decode.cu", "hyb_rows_16", 512), 16, 2, 32),
    ],
    ("mul1", "exl3"): [
        Variant(Kernel("decode.cu", "mul1_exl3_8", 512), 8, 2, 0),
        Variant(Kernel("decode.cu", "mul1_exl3_16", 512), 16, 2, 0),
    ],
}
"""By code and order; the first that takes the activations multiplies them."""


def runs(code: TrellisCode) -> bool:
    """Whether there is a CUDA kernel for this code."""
    return (code.name, code.order) in VARIANTS and code.spec.L == 16 and code.spec.k == 2


def multiply(
    x: Tensor, codes: Tensor, table: Tensor, code: TrellisCode, out: int, *, overlap: bool = False
) -> Tensor:
    """``decode_triton.multiply`` for the codes that ``runs`` names.

    Args:
        x: float16 [B, in], in a multiple of 16; contiguous, B of 1 to 16.
        codes: int16 [tiles, 32], contiguous.
        table: int32, as ``decode_table`` makes it.
        code: how the matrix was written.
        out: rows of the matrix, a multiple of 16.
        overlap: start while the kernel before it ends; only where that kernel makes nothing but x.

    Returns:
        float32 [shares, B, out], to be summed over the first dimension.
    """
    variant = next(v for v in VARIANTS[code.name, code.order] if v.takes(*x.shape))
    return launch(variant, x, codes, table, out, overlap=overlap)


def launch(
    variant: Variant, x: Tensor, codes: Tensor, table: Tensor, out: int, *, overlap: bool = False
) -> Tensor:
    """``multiply`` by this variant, whatever the code."""
    batch, inputs = x.shape
    deal = Deal.of(out, inputs, variant.warps, multiprocessors(x.device))
    partial = torch.empty(deal.shares, batch, out, dtype=torch.float32, device=x.device)
    aligned = [t if t.data_ptr() % 16 == 0 else t.clone() for t in (x, codes)]
    variant.kernel(
        deal.grid,
        variant.shared_bytes(batch, inputs),
        x.device,
        [*aligned, table, partial],
        [batch, out // 16, inputs // 16, deal.shares, deal.least, deal.more],
        overlap=overlap and aligned[1] is codes,  # a copy of the codes would be the kernel before
    )
    return partial
