"""Products with packed weights in CUDA C++: ``trellis/cuda/decode.cu``.

For k = 2: HYB in the order "rows" at L = 12 and 16, and mul1 in EXL3's order at L = 16. All else is
left to ``decode_triton``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from softtrellis.quantizers.hard import TrellisCode
from softtrellis.transforms.incoherence import padded_size
from softtrellis.trellis.launch_cuda import (
    MAX_SHARED_BYTES,
    MOST_PREPARED,
    TYPES,
    Kernel,
    Prepared,
    address,
    aligned,
    multiprocessors,
)

MOST_ROWS = 48
"""Rows that ``multiply`` takes; for more, decoding to memory is faster (benchmarks/README.md)."""

_MORE_THAN_HALF = 115 * 1024
_STRIP, _UNIT_INPUTS = 32, 128
_TABLE_ROWS, _POINTERS = 1024, 7
_ROWS = 16  # of a launch
_LEAST_UNITS = 4  # of a block: one for each scheduler of a multiprocessor
_LEAST_BITS = 5  # of the channels that a product rotates together

Inputs = Literal["global", "shared", "rotated"]


@dataclass(frozen=True, eq=False)
class Variant:
    """A kernel of ``decode.cu`` and what its template's parameters are.

    Attributes:
        kernel: the kernel itself.
        rows: most rows of activations that it takes.
        table: whether it has HYB's table.
        inputs: where activations come from: global memory; a copy of all of them in every block's
            shared memory; one row that every block itself rotates.
    """

    kernel: Kernel
    rows: int
    table: bool
    inputs: Inputs = "global"

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.kernel.threads // 32

    def shared_bytes(self, batch: int, inputs: int) -> int:
        """Dynamic shared memory of a block.

        That is the table, x, each warp's sums of two strips, and room to rotate a row. It is more
        than half of what a multiprocessor has, as two blocks on one, and none on another, would
        take twice as long.
        """
        size = 4 * 32 * _TABLE_ROWS if self.table else 0
        if self.inputs != "global":
            size += batch * (-(-inputs // _UNIT_INPUTS) * 2 * _UNIT_INPUTS + 16)
        if self.inputs == "rotated":
            size += 4 * inputs + 4 * self.warps
        size += self.warps * 2 * 4 * _STRIP * batch
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


Kind = tuple[str, str, int]
"""A code's name, the order of its tiles, and L."""

VARIANTS: dict[Kind, list[Variant]] = {
    **{
        ("hyb", "rows", L): [
            Variant(Kernel("decode.cu", f"{name}_one_row", 384), 1, True, "shared"),
            Variant(Kernel("decode.cu", f"{name}_rows_8", 384), 8, True),
            Variant(Kernel("decode.cu", f"{name}_rows_16", 384), 16, True),
        ]
        for L, name in ((12, "hyb12"), (16, "hyb"))
    },
    ("mul1", "exl3", 16): [
        Variant(Kernel("decode.cu", "mul1_one_row", 256), 1, False, "shared"),
        Variant(Kernel("decode.cu", "mul1_rows_8", 384), 8, False),
        Variant(Kernel("decode.cu", "mul1_rows_16", 384), 16, False),
    ],
}
"""The first that takes the activations multiplies them."""

ROTATING: dict[Kind, Variant] = {
    ("hyb", "rows", 12): Variant(Kernel("decode.cu", "hyb12_rotating", 384), 1, True, "rotated"),
    ("hyb", "rows", 16): Variant(Kernel("decode.cu", "hyb_rotating", 384), 1, True, "rotated"),
    ("mul1", "exl3", 16): Variant(Kernel("decode.cu", "mul1_rotating", 256), 1, False, "rotated"),
}
"""Those that rotate the activations too."""


def kind_of(code: TrellisCode) -> Kind:
    """What a code's kernels are chosen by."""
    return code.name, code.order, code.spec.L


def runs(code: TrellisCode) -> bool:
    """Whether there is a CUDA kernel for this code."""
    return kind_of(code) in VARIANTS and code.spec.k == 2


def rotates(
    code: TrellisCode, x: Tensor, scales: Tensor | None, multiple: int, block: int | None
) -> bool:
    """Whether ``rotate_and_multiply`` takes these activations.

    Those are one row without padding, of a multiple of 128 channels that fits a block's shared
    memory, whose transform is Sylvester's: of blocks, or of all channels, of a power of two.
    """
    return reads(x, scales) and rotates_rows(code, x.shape[0], x.shape[1], multiple, block)


def reads(x: Tensor, scales: Tensor | None) -> bool:
    """Whether ``rotate_and_multiply`` can read these activations, whatever their sizes."""
    return x.dtype in TYPES and aligned(x, scales)


def rotates_rows(
    code: TrellisCode, batch: int, inputs: int, multiple: int, block: int | None
) -> bool:
    """What ``rotates`` says of aligned activations of these sizes."""
    order = block or inputs
    return (
        runs(code)
        and batch == 1
        and padded_size(inputs, multiple) == inputs
        and inputs % _UNIT_INPUTS == 0
        and inputs % order == 0
        and order.bit_count() == 1
        and order >= 1 << _LEAST_BITS
        and ROTATING[kind_of(code)].takes(batch, inputs)
    )


def rotates_fast(inputs: int, out: int) -> bool:
    """Whether ``rotate_and_multiply`` is faster than a rotation of its own and ``multiply``.

    Every block rotates the whole row, which takes it 2 us for 4096 channels and 4.4 us for 8192; a
    kernel of 8 blocks or more takes 3.3 and 3.8 us, its launch included. With 28672 outputs that
    kernel won, too: the rotation's shared memory kept the next kernel out (launch_cuda.CARVEOUT).
    """
    return inputs <= 4096 and out <= 16384


def rotate_and_multiply(
    x: Tensor,
    signs: Tensor,
    scales: Tensor | None,
    codes: Tensor,
    table: Tensor,
    code: TrellisCode,
    out: int,
    block: int | None,
    *,
    by_strips: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rotation_cuda.rotate_input`` and ``multiply`` in one kernel, for what ``rotates`` names.

    It begins, and reads codes and table, while the kernel before it ends.

    Args:
        x: float16, bfloat16 or float32 [..., in] of one row.
        signs, scales, block: as in ``rotate_input``.
        codes, table, code, out, by_strips: as in ``multiply``.

    Returns:
        What ``multiply`` returns, and float32 [1], the row's largest number, by which it divided.
    """
    norm = x.new_empty(1, dtype=torch.float32)
    variant = ROTATING[kind_of(code)]
    inputs = x.numel()
    row = (block or inputs).bit_length() - 1, TYPES[x.dtype]
    pointers = address(signs), address(scales), address(norm)
    partial = _launch(
        variant, (1, inputs), x, codes, table, out, row, pointers, overlap=True, by_strips=by_strips
    )
    return partial, norm


def multiply(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    code: TrellisCode,
    out: int,
    *,
    overlap: bool = False,
    by_strips: bool = False,
) -> Tensor:
    """``decode_triton.multiply`` for the codes that ``runs`` names.

    Args:
        x: float16 [B, in], in a multiple of 16; contiguous, B of 1 to ``MOST_ROWS``.
        codes: int16 [tiles, 32], contiguous.
        table: int32, as ``decode_table`` makes it.
        code: how the matrix was written.
        out: rows of the matrix, a multiple of 16.
        overlap: start while the kernel before it ends; only where that kernel makes nothing but x.
        by_strips: put each 32 outputs, of a multiple of 32, through Sylvester's transform.

    Returns:
        float32 [shares, B, out], to be summed over the first dimension.
    """
    parts = -(-x.shape[0] // _ROWS)
    if parts > 1:
        found = (
            multiply(rows, codes, table, code, out, overlap=overlap, by_strips=by_strips)
            for rows in x.tensor_split(parts)
        )
        return torch.cat(list(found), 1)
    variant = _variant(kind_of(code), *x.shape)
    return launch(variant, x, codes, table, out, overlap=overlap, by_strips=by_strips)


@lru_cache(maxsize=MOST_PREPARED)
def _variant(kind: Kind, batch: int, inputs: int) -> Variant:
    return next(v for v in VARIANTS[kind] if v.takes(batch, inputs))


def launch(
    variant: Variant,
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    out: int,
    *,
    overlap: bool = False,
    by_strips: bool = False,
) -> Tensor:
    """``multiply`` by this variant, whatever the code."""
    x = x if aligned(x) else x.clone()
    shape = x.shape[0], x.shape[1]
    return _launch(variant, shape, x, codes, table, out, overlap=overlap, by_strips=by_strips)


def _launch(
    variant: Variant,
    shape: tuple[int, int],
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    out: int,
    row: tuple[int, int] = (0, 0),
    pointers: tuple[int, int, int] = (0, 0, 0),
    *,
    overlap: bool,
    by_strips: bool,
) -> Tensor:
    """With x's shape and what only variants that rotate have: bits, type; signs, scales, norm."""
    batch, inputs = shape
    there = codes.data_ptr() % 16 == 0
    overlap = overlap and there  # a copy of the codes would be the kernel before
    launch, shares = _prepared(variant, batch, inputs, out, row, overlap, by_strips, x.device)
    partial = x.new_empty(shares, batch, out, dtype=torch.float32)
    read = codes if there else codes.clone()
    first = read.data_ptr(), table.data_ptr(), x.data_ptr(), partial.data_ptr()
    launch(x.get_device(), [first + pointers])
    return partial


@lru_cache(maxsize=MOST_PREPARED)
def _prepared(
    variant: Variant,
    batch: int,
    inputs: int,
    out: int,
    row: tuple[int, int],
    overlap: bool,
    by_strips: bool,
    device: torch.device,
) -> tuple[Prepared, int]:
    """A product's launch, and the shares of its partial sums."""
    deal = Deal.of(out, inputs, variant.warps, multiprocessors(device))
    work = [batch, out // 16, inputs // 16, deal.shares, deal.least, deal.more]
    structure = _POINTERS, [*work, *row, by_strips]
    shared_bytes = variant.shared_bytes(batch, inputs)
    launch = Prepared(variant.kernel, deal.grid, shared_bytes, [structure], overlap=overlap)
    return launch, deal.shares
