"""Products with packed weights in CUDA C++: ``trellis/cuda/decode.cu``.

For the two profiles at L = 16 and k = 2: HYB in the order "rows" and mul1 in EXL3's order. All else
is left to ``decode_triton``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softtrellis.quantizers.hard import TrellisCode
from softtrellis.trellis.launch_cuda import Kernel, multiprocessors

_FEW_ROWS = 8
_TABLE_BYTES = 1024 * 32 * 4
_KERNELS = {
    ("hyb", "rows", True): Kernel("decode.cu", "hyb_rows_8", 512),
    ("hyb", "rows", False): Kernel("decode.cu", "hyb_rows_16", 256),
    ("mul1", "exl3", True): Kernel("decode.cu", "mul1_exl3_8", 512),
    ("mul1", "exl3", False): Kernel("decode.cu", "mul1_exl3_16", 256),
}


def runs(code: TrellisCode) -> bool:
    """Whether there is a CUDA kernel for this code."""
    return (code.name, code.order, True) in _KERNELS and code.spec.L == 16 and code.spec.k == 2


def shares(octets: int, groups: int, grid: int) -> int:
    """Most blocks of the grid that work for one octet of 8 blocks of outputs.

    All ``octets * groups`` units of work, in this order, are dealt evenly to ``grid`` blocks.
    """
    units = octets * groups

    def block_of(unit: int) -> int:
        return ((unit + 1) * grid - 1) // units

    firsts = range(0, units, groups)
    return max(block_of(first + groups - 1) - block_of(first) + 1 for first in firsts)


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
    batch, inputs = x.shape
    kernel = _KERNELS[code.name, code.order, batch <= _FEW_ROWS]
    octets, groups = -(-out // 128), -(-inputs // 64)
    grid = min(multiprocessors(x.device), octets * groups)
    count = shares(octets, groups, grid)
    partial = torch.empty(count, batch, out, dtype=torch.float32, device=x.device)
    sums = 4 * 128 * min(batch, _FEW_ROWS) * (kernel.threads // 32)
    aligned = [t if t.data_ptr() % 16 == 0 else t.clone() for t in (x, codes)]
    kernel(
        grid,
        sums + (_TABLE_BYTES if code.name == "hyb" else 0),
        x.device,
        [*aligned, table, partial],
        [batch, out // 16, inputs // 16, count],
        overlap=overlap and aligned[1] is codes,  # a copy of the codes would be the kernel before
    )
    return partial
