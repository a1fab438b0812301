"""Matrices of +-1 as the bits that ``trellis/cuda/signs.cuh`` multiplies with."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from softtrellis.transforms.hadamard import kronecker_factors

Factor = Literal["left", "right"]


def packed_bytes(steps: int) -> int:
    """Of 16 rows of packed signs with 16 ``steps`` columns."""
    return -(-steps // 4) * 128


def packed_signs(matrix: Tensor, factor: Factor) -> Tensor:
    """A matrix of +-1 as the bits that the matrix instruction's lanes take.

    Bit 15 - r + 16 e of word [t, w, 4 g + q] is 1 where the matrix is -1, for r = 4 s + h + 2 p:
    in row 16 t + 8 h + g and, of the 16 columns from 16 (4 w + s) on, in 4 q + 2 p + e of the
    right factor and in 8 p + 4 e + q of the left one.

    Args:
        matrix: int8 [n, n] of +-1.
        factor: which of the two factors it is.

    Returns:
        int32 [ceil(n / 16), ceil(n / 64), 32] on the matrix' device.
    """
    tiles, words = -(-len(matrix) // 16), -(-len(matrix) // 64)
    padding = (0, 64 * words - len(matrix), 0, 16 * tiles - len(matrix))
    bits = functional.pad((matrix < 0).long(), padding)
    if factor == "right":
        t, h, g, w, s, q, p, e = range(8)
        shape = (tiles, 2, 8, words, 4, 4, 2, 2)
    else:
        t, h, g, w, s, p, e, q = range(8)
        shape = (tiles, 2, 8, words, 4, 2, 2, 4)
    bits = bits.reshape(shape).permute(t, w, g, q, e, s, p, h).reshape(tiles, words, 32, 2, 16)
    places = torch.arange(15, -1, -1, device=matrix.device) + torch.tensor(
        [[0], [16]], device=matrix.device
    )
    packed = (bits << places).sum((-2, -1))
    return torch.where(packed < 1 << 31, packed, packed - (1 << 32)).to(torch.int32)


@lru_cache(maxsize=256)
def packed_factors(
    order: int, a: int | None, inverse: bool, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Packed A and B of H = A (x) B, or their transposes; None and H without an ``a``.

    Args:
        order: of H.
        a: of A, that of ``kronecker_factors``, or any where the order is a power of two.
        inverse: whether to transpose.
        device: where to put them.
    """
    left, right = kronecker_factors(order)
    if a not in (None, len(left)):
        left, right = (torch.kron(*kronecker_factors(n)) for n in (a, order // a))
    if a is None:
        right = torch.kron(left, right)
    if inverse:
        left, right = left.mT, right.mT
    with torch.inference_mode(False):
        packed = packed_signs(left, "left").to(device), packed_signs(right, "right").to(device)
    if device.type == "cuda":  # a kernel reads them without waiting for anything
        torch.cuda.current_stream(device).synchronize()
    return None if a is None else packed[0], packed[1]
