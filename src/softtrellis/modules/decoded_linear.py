"""x Wᵀ + b with a weight that is decoded when it is needed and not kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Decode = Callable[[], Tensor]
"""Gives the weight [out, in], the same each time."""


def decoded_linear(x: Tensor, decode: Decode, bias: Tensor | None) -> Tensor:
    """[..., in] to [..., out] with a frozen weight, differentiable in ``x`` and ``bias``.

    ``torch.nn.functional.linear`` keeps the weight until the backward pass, so that a model would
    keep all its decoded weights at once. Here ``decode`` is called again there instead.
    """
    takes_gradient = x.requires_grad or (bias is not None and bias.requires_grad)
    if not (takes_gradient and torch.is_grad_enabled()):
        return functional.linear(x, decode().to(x.dtype), bias)
    result: Tensor = _DecodedLinear.apply(x, bias, decode)  # type: ignore[no-untyped-call]
    return result


class _DecodedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, decode: Decode) -> Tensor:
        ctx.decode = decode
        ctx.dtype = x.dtype
        return functional.linear(x, decode().to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ ctx.decode().to(grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = grad.flatten(0, -2).sum(0)
        return of_x, of_bias, None
