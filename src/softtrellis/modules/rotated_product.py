"""Products with packed weights between rotations of their inputs and outputs, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softtrellis.quantizers.hard import TrellisCode
from softtrellis.transforms.incoherence import padded_size

if TYPE_CHECKING:
    from softtrellis.modules.decode import ResolvedDecodeBackend

FUSED_ROWS = 16
"""Most rows of x that the fused kernel takes; for more, the matrix is decoded to memory first."""

Output = tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]
"""Of a layer: signs, scale, scales, bias and features."""


@dataclass(frozen=True, eq=False)
class RotatedProduct:
    """Products of one or more layers with the same rotated inputs.

    Attributes:
        partials: float32 [splits, B, out] of each layer.
        norms: float32 [B], what the rotated inputs were divided by.
        by_strips: whether they have gone through the transform of ``decode_cuda.multiply``.
    """

    partials: Sequence[Tensor]
    norms: Tensor
    by_strips: bool


def partial_product(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    code: TrellisCode,
    out: int,
    backend: ResolvedDecodeBackend,
    *,
    overlap: bool = False,
    by_strips: bool = False,
) -> Tensor:
    """float32 [splits, B, out]; see ``decode_triton.multiply`` and ``decode_cuda.multiply``."""
    from softtrellis.modules import decode_cuda, decode_triton

    if x.shape[0] > FUSED_ROWS:
        matrix = decode_triton.decode(codes, table, code, out, x.shape[1], torch.float16)
        return torch.matmul(x, matrix.T).float().unsqueeze(0)
    if backend == "cuda" and decode_cuda.runs(code):
        return decode_cuda.multiply(
            x, codes, table, code, out, overlap=overlap, by_strips=by_strips
        )
    return decode_triton.multiply(x, codes, table, code, out)


def rotations(backend: ResolvedDecodeBackend, width: int, block: int | None) -> ModuleType:
    """The module that rotates rows of so many padded channels."""
    from softtrellis.transforms import rotation_cuda, rotation_triton

    if backend == "cuda" and rotation_cuda.runs(width, block):
        return rotation_cuda
    return rotation_triton


def rotated_product(
    x: Tensor,
    signs: Tensor,
    scales: Tensor | None,
    codes: Tensor,
    table: Tensor,
    code: TrellisCode,
    outs: Sequence[int],
    backend: ResolvedDecodeBackend,
    *,
    multiple: int,
    block: int | None,
) -> RotatedProduct:
    """``partial_product`` of x's rows, rotated, for layers of so many padded outputs.

    The kernels read codes and table while the last kernel before them ends, which must not have
    written those.
    """
    from softtrellis.modules import decode_cuda
    from softtrellis.transforms import rotation_cuda

    there, cuda = codes.is_contiguous(), backend == "cuda" and decode_cuda.runs(code)
    by_strips = cuda and x.shape[0] <= FUSED_ROWS
    by_strips = by_strips and all(rotation_cuda.by_strips(out, block) for out in outs)
    itself = cuda and there and decode_cuda.rotates(code, x, scales, multiple, block)
    if itself and decode_cuda.rotates_fast(x.shape[1], sum(outs)):
        partial, norms = decode_cuda.rotate_and_multiply(
            x, signs, scales, codes, table, code, sum(outs), block, by_strips=by_strips
        )
    else:
        width = padded_size(x.shape[1], multiple)
        rotated, norms = rotations(backend, width, block).rotate_input(
            x, signs, scales, multiple=multiple, block=block
        )
        partial = partial_product(
            rotated, codes.contiguous(), table, code, sum(outs), backend,
            overlap=there, by_strips=by_strips,
        )  # fmt: skip
    return RotatedProduct(partial.split(list(outs), -1), norms, by_strips)


def unrotated(
    product: RotatedProduct,
    layers: Sequence[Output],
    *,
    factor: float,
    dtype: torch.dtype,
    backend: ResolvedDecodeBackend,
    block: int | None,
) -> list[Tensor]:
    """Each layer's outputs [B, features], in one launch where CUDA C++ rotates them all."""
    from softtrellis.transforms import rotation_cuda

    kernels = [rotations(backend, partial.shape[-1], block) for partial in product.partials]
    if all(kernel is rotation_cuda for kernel in kernels):
        return rotation_cuda.unrotate_outputs(
            product.partials, product.norms, layers,
            factor=factor, dtype=dtype, block=block, by_strips=product.by_strips,
        )  # fmt: skip
    return [
        kernel.unrotate_output(
            partial, product.norms, *layer[:4],
            features=layer[4], factor=factor, dtype=dtype, block=block,
        )
        for kernel, partial, layer in zip(kernels, product.partials, layers, strict=True)
    ]  # fmt: skip
