"""Products with packed weights between rotations of their inputs and outputs, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from softtrellis.modules import decode_cuda
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.transforms import rotation_cuda
from softtrellis.transforms.incoherence import padded_size
from softtrellis.trellis.launch_cuda import MOST_PREPARED

if TYPE_CHECKING:
    from softtrellis.modules.decode import ResolvedDecodeBackend

FUSED_ROWS = 16
"""Most rows of x that Triton's kernel takes; for more, the matrix is decoded to memory first."""

Output = tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]
"""Of a layer: signs, scale, scales, bias and features."""


class RotatedProduct(NamedTuple):
    """Products of one or more layers with the same rotated inputs.

    Attributes:
        partials: float32 [splits, B, out] of each layer.
        norms: float32 [B], what the rotated inputs were divided by.
        rows: the shape of x without its channels, of B elements.
        by_strips: whether they have gone through the transform of ``decode_cuda.multiply``.
        in_cuda: whether ``rotation_cuda`` takes all of them.
    """

    partials: Sequence[Tensor]
    norms: Tensor
    rows: Sequence[int]
    by_strips: bool
    in_cuda: bool


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
    if backend == "cuda" and decode_cuda.runs(code) and x.shape[0] <= decode_cuda.MOST_ROWS:
        return decode_cuda.multiply(
            x, codes, table, code, out, overlap=overlap, by_strips=by_strips
        )
    from softtrellis.modules import decode_triton

    if x.shape[0] > FUSED_ROWS:
        matrix = decode_triton.decode(codes, table, code, out, x.shape[1], torch.float16)
        return torch.matmul(x, matrix.T).float().unsqueeze(0)
    return decode_triton.multiply(x, codes, table, code, out)


def rotations(backend: ResolvedDecodeBackend, width: int, block: int | None) -> ModuleType:
    """The module that rotates rows of so many padded channels."""
    if backend == "cuda" and rotation_cuda.runs(width, block):
        return rotation_cuda
    from softtrellis.transforms import rotation_triton

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
    """``partial_product`` of x [..., in], contiguous and rotated, for layers of so many padded
    outputs.

    The kernels read codes and table while the last kernel before them ends, which must not have
    written those.
    """
    *rows, inputs = x.shape
    batch, whole = x.numel() // inputs, sum(outs)
    by_strips, itself, in_cuda = _way(code, batch, inputs, tuple(outs), backend, multiple, block)
    there = codes.is_contiguous()
    if itself and there and decode_cuda.reads(x, scales):
        partial, norms = decode_cuda.rotate_and_multiply(
            x, signs, scales, codes, table, code, whole, block, by_strips=by_strips
        )
    else:
        width = padded_size(inputs, multiple)
        rotated, norms = rotations(backend, width, block).rotate_input(
            x.view(batch, inputs), signs, scales, multiple=multiple, block=block
        )
        partial = partial_product(
            rotated, codes.contiguous(), table, code, whole, backend,
            overlap=there, by_strips=by_strips,
        )  # fmt: skip
    partials = [partial] if len(outs) == 1 else partial.split(list(outs), -1)
    return RotatedProduct(partials, norms, rows, by_strips, in_cuda)


@lru_cache(maxsize=MOST_PREPARED)
def _way(
    code: TrellisCode,
    batch: int,
    inputs: int,
    outs: tuple[int, ...],
    backend: ResolvedDecodeBackend,
    multiple: int,
    block: int | None,
) -> tuple[bool, bool, bool]:
    """Whether a product transforms strips of its outputs, whether it rotates its inputs where they
    are aligned, and whether ``rotation_cuda`` takes all its outputs.
    """
    in_cuda = backend == "cuda" and all(rotation_cuda.runs(out, block) for out in outs)
    if backend != "cuda" or not decode_cuda.runs(code):
        return False, False, in_cuda
    by_strips = all(rotation_cuda.by_strips(out, block) for out in outs)
    by_strips = by_strips and batch <= decode_cuda.MOST_ROWS
    itself = decode_cuda.rotates_rows(code, batch, inputs, multiple, block)
    return by_strips, itself and decode_cuda.rotates_fast(inputs, sum(outs)), in_cuda


def unrotated(
    product: RotatedProduct,
    layers: Sequence[Output],
    *,
    factor: float,
    dtype: torch.dtype,
    backend: ResolvedDecodeBackend,
    block: int | None,
) -> list[Tensor]:
    """Each layer's outputs [..., features], in one launch where CUDA C++ rotates them all."""
    if product.in_cuda:
        return rotation_cuda.unrotate_outputs(
            product.partials, product.norms, layers,
            factor=factor, dtype=dtype, block=block, by_strips=product.by_strips,
            rows=product.rows,
        )  # fmt: skip
    return [
        rotations(backend, partial.shape[-1], block)
        .unrotate_output(
            partial, product.norms, *layer[:4],
            features=layer[4], factor=factor, dtype=dtype, block=block,
        )
        .view(*product.rows, layer[4])
        for partial, layer in zip(product.partials, layers, strict=True)
    ]  # fmt: skip
