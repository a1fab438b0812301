"""Rotations of a few rows of activations in Triton, with all that goes with them in one kernel.

With H_n = A (x) B a row x of n channels, seen as a matrix [a, b], becomes A x B^T. A program takes
one row of activations and a few rows of A: two small matrix products, whose other factor is +-1.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from softtrellis.transforms.hadamard import hadamard_blocks, kronecker_factors
from softtrellis.transforms.incoherence import padded_size

_LEFT_ROWS = 16
_LEFT_COLUMNS = 64
_WARPS = 4
_NORM_CHANNELS = 8192


@triton.jit
def _sign(signs, channel, inside):
    """float32 +-1 of channels, from packed bits."""
    byte = tl.load(signs + channel // 8, mask=inside, other=0).to(tl.int32)
    return 1.0 - 2.0 * ((byte >> (7 - channel % 8)) & 1).to(tl.float32)


@triton.jit
def _input(x, signs, scales, row, channel, inside, features, SCALES: tl.constexpr):
    """in_scale * x with the signs of the rotation; zero beyond the features."""
    inside = inside & (channel < features)
    value = tl.load(x + row * features + channel, mask=inside, other=0.0).to(tl.float32)
    if SCALES:
        value = value * tl.load(scales + channel, mask=inside, other=0.0).to(tl.float32)
    return value * _sign(signs, channel, inside)


@triton.jit
def _sum(partial, row, channel, inside, batch, width, splits):
    """Sum of the shares, in their order."""
    value = tl.zeros(channel.shape, tl.float32)
    for split in range(splits):
        at = (split * batch + row) * width + channel
        value += tl.load(partial + at, mask=inside, other=0.0)
    return value


@triton.jit
def _norm(x, scales, row, features, SCALES: tl.constexpr, CHANNELS: tl.constexpr):
    """Largest absolute value of in_scale * x; 1 for a row of zeros."""
    greatest = 0.0
    for first in range(0, features, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = channel < features
        value = tl.load(x + row * features + channel, mask=inside, other=0.0).to(tl.float32)
        if SCALES:
            value = value * tl.load(scales + channel, mask=inside, other=0.0).to(tl.float32)
        greatest = tl.maximum(greatest, tl.max(tl.abs(value), 0))
    return tl.where(greatest == 0.0, 1.0, greatest)


@triton.jit
def _rotate(
    source, target, norms, left, right, signs, scales, bias, scale,
    features, width, first, splits, factor,
    A: tl.constexpr, B: tl.constexpr, INPUT: tl.constexpr, LEFT: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    SCALES: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Channels first .. first + A B of one row: into the rotated basis (INPUT) or out of it.

    With OVERLAP the kernel after the first rotation may begin early, and the last rotation begins
    before the product has ended and waits for it.
    """
    if OVERLAP:
        if INPUT:
            gdc_launch_dependents()
        else:
            gdc_wait()
    row, batch = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    out_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column, step = tl.arange(0, COLUMNS)[None, :], tl.arange(0, STEP)
    if LEFT:
        half = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, A, STEP):
            i = begin + step
            inside = (i[:, None] < A) & (column < B)
            channel = first + i[:, None] * B + column
            if INPUT:
                value = _input(source, signs, scales, row, channel, inside, features, SCALES)
                at = out_row * A + i[None, :]
            else:
                value = _sum(source, row, channel, inside, batch, width, splits)
                at = i[None, :] * A + out_row
            matrix = tl.load(left + at, mask=(out_row < A) & (i[None, :] < A), other=0)
            half = tl.dot(matrix.to(tl.float32), value, half, input_precision="tf32x3")
    else:
        inside = (out_row < A) & (column < B)
        channel = first + out_row * B + column
        if INPUT:
            half = _input(source, signs, scales, row, channel, inside, features, SCALES)
        else:
            half = _sum(source, row, channel, inside, batch, width, splits)
    j = tl.arange(0, COLUMNS)[:, None]
    at = column * B + j if INPUT else j * B + column
    matrix = tl.load(right + at, mask=(j < B) & (column < B), other=0).to(tl.float32)
    whole = tl.dot(half, matrix, input_precision="tf32x3")

    channel = first + out_row * B + column
    inside = (out_row < A) & (column < B)
    if INPUT:
        norm = _norm(source, scales, row, features, SCALES, CHANNELS)
        tl.store(norms + row, norm)
        rotated = (whole * (factor / norm)).to(tl.float16)
        tl.store(target + row * width + channel, rotated, mask=inside)
    else:
        inside = inside & (channel < features)
        whole *= factor * tl.load(scale) * tl.load(norms + row)
        whole *= _sign(signs, channel, inside)
        if SCALES:
            whole *= tl.load(scales + channel, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            whole += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        at = target + row * features + channel
        tl.store(at, whole.to(target.dtype.element_ty), mask=inside)


@lru_cache(maxsize=256)
def _factors(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    left, right = kronecker_factors(n)
    with torch.inference_mode(False):
        return left.to(device), right.to(device)


def _parts(width: int, block: int | None) -> list[tuple[int, int, int, bool]]:
    """(first channel, order, repetitions, whether A is a Hadamard matrix) of each transform."""
    if block is not None:
        return [(0, block, width // block, False)]
    orders = hadamard_blocks(width)
    return [(sum(orders[:i]), order, 1, True) for i, order in enumerate(orders)]


def _launch(
    source: Tensor,
    target: Tensor,
    norms: Tensor,
    signs: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    *,
    features: int,
    width: int,
    stride: int,
    block: int | None,
    splits: int,
    factor: float,
) -> None:
    parts = _parts(width, block)
    overlap = len(parts) == 1 and _can_overlap(source.device)
    for first, order, count, full in parts:
        left, right = _factors(order, source.device)
        if not full:  # I (x) H_block, whose factors are small: one matrix
            right = _whole(order, source.device)
        a, b = (left.shape[0], right.shape[0]) if full else (count, order)
        columns = max(16, triton.next_power_of_2(b))
        _rotate[(norms.shape[0], triton.cdiv(a, _LEFT_ROWS))](
            source,
            target,
            norms,
            left,
            right,
            signs,
            scales,
            bias,
            scale,
            features,
            stride,
            first,
            splits,
            factor / math.sqrt(order),
            A=a,
            B=b,
            INPUT=splits == 0,
            LEFT=full,
            ROWS=_LEFT_ROWS,
            STEP=min(_LEFT_COLUMNS, max(16, triton.next_power_of_2(a))),
            COLUMNS=columns,
            CHANNELS=min(_NORM_CHANNELS, triton.next_power_of_2(features)),
            SCALES=scales is not None,
            BIAS=bias is not None,
            OVERLAP=overlap,
            num_warps=_WARPS,
            **({"launch_pdl": True} if overlap and splits > 0 else {}),
        )


@cache
def _can_overlap(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launches: NVIDIA's from Hopper on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache(maxsize=16)
def _whole(order: int, device: torch.device) -> Tensor:
    left, right = kronecker_factors(order)
    with torch.inference_mode(False):
        return torch.kron(left, right).to(device)


def rotate_input(
    x: Tensor,
    signs: Tensor,
    scales: Tensor | None,
    *,
    multiple: int = 16,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``Incoherence.rotate_input`` of in_scale * x, divided by the row's largest |in_scale * x|.

    The division keeps any activations within float16: what comes out is at most sqrt(in_pad).

    Args:
        x: [B, in], contiguous, any floating dtype of at most 32 bits; computed in float32.
        signs: uint8, packed signs of the padded inputs.
        scales: float16 [in], or None for ones.
        multiple, block: of the rotation, see ``Incoherence``.

    Returns:
        float16 [B, in_pad] and the divisors, float32 [B].
    """
    batch, features = x.shape
    width = padded_size(features, multiple)
    target = torch.empty(batch, width, dtype=torch.float16, device=x.device)
    norms = torch.empty(batch, dtype=torch.float32, device=x.device)
    _launch(
        x, target, norms, signs, scales, None, None,
        features=features, width=width, stride=width, block=block, splits=0, factor=1.0,
    )  # fmt: skip
    return target, norms


def unrotate_output(
    partial: Tensor,
    norms: Tensor,
    signs: Tensor,
    scale: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    *,
    features: int,
    factor: float,
    dtype: torch.dtype,
    block: int | None = None,
) -> Tensor:
    """``Incoherence.unrotate_output`` of the sum of ``partial``, scaled, plus the bias.

    Args:
        partial: float32 [splits, B, out_pad], summed over the first dimension; contiguous, or
            some of the last dimension of a contiguous tensor, from a multiple of 4 on.
        norms: float32 [B], what ``rotate_input`` divided by.
        signs: uint8, packed signs of the padded outputs.
        scale: float32 [], and ``factor``: multiply every output.
        scales: float16 [out], or None for ones.
        bias: [out], or None.
        features: outputs, without the padding.
        factor: see scale.
        dtype: of the result.
        block: of the rotation, see ``Incoherence``.

    Returns:
        [B, out].
    """
    splits, batch, width = partial.shape
    y = torch.empty(batch, features, dtype=dtype, device=partial.device)
    _launch(
        partial, y, norms, signs, scales, bias, scale,
        features=features, width=width, stride=partial.stride(1), block=block, splits=splits,
        factor=factor,
    )  # fmt: skip
    return y
