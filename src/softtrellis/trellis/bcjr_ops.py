"""BCJR's operators for autograd and ``torch.compile``: average and gradient, or that alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softtrellis.backend import Backend, resolve_backend
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.dispatch import implementation
from softtrellis.trellis.memory import BCJR, BCJR_BACKWARD


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


torch.library.define(
    "softtrellis::soft_forward",
    "(Tensor w, Tensor codebook, Tensor temperature, Tensor? pins, int L, int k, int V, "
    "bool with_entropy, str backend) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "softtrellis::soft_backward",
    "(Tensor w, Tensor codebook, Tensor temperature, Tensor? pins, Tensor values, "
    "Tensor grad_values, Tensor? grad_log_z, int L, int k, int V, bool with_codebook, str backend) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("softtrellis::soft_forward", "default")
def _soft_forward(
    w: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    pins: Tensor | None,
    L: int,
    k: int,
    V: int,
    with_entropy: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend's ``soft_forward``; an entropy that was not asked for is empty, [0]."""
    w, codebook, spec = w.contiguous(), codebook.contiguous(), TrellisSpec(L, k, V)
    module = implementation("bcjr", resolve_backend(backend, w))

    def forward(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        ends = None if pins is None else pins[part]
        values, log_z, entropy = module.soft_forward(
            w[part], codebook, spec, temperature[part], ends, with_entropy
        )
        return values, log_z, w.new_empty(0) if entropy is None else entropy

    values, log_z, entropy = map(_joined, zip(*BCJR.run(forward, w, spec), strict=True))
    return values, log_z, entropy


def _soft_forward_shapes(
    w: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    pins: Tensor | None,
    L: int,
    k: int,
    V: int,
    with_entropy: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:
    entropy = w.new_empty(w.shape[:2] if with_entropy else 0)
    return w.new_empty(w.shape), w.new_empty(w.shape[0]), entropy


torch.library.register_fake("softtrellis::soft_forward", _soft_forward_shapes)


@torch.library.impl("softtrellis::soft_backward", "default")
def _soft_backward(
    w: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    pins: Tensor | None,
    values: Tensor,
    grad_values: Tensor,
    grad_log_z: Tensor | None,
    L: int,
    k: int,
    V: int,
    with_codebook: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """The backend's ``soft_backward``; a gradient that was not asked for is empty, [0]."""
    w, codebook, spec = w.contiguous(), codebook.contiguous(), TrellisSpec(L, k, V)
    grad_values = grad_values.contiguous()
    grad_log_z = None if grad_log_z is None else grad_log_z.contiguous()
    module = implementation("bcjr", resolve_backend(backend, w))

    def backward(part: slice) -> tuple[Tensor, Tensor]:
        grad_w, grad_codebook = module.soft_backward(
            w[part],
            codebook,
            spec,
            temperature[part],
            None if pins is None else pins[part],
            values[part],
            grad_values[part],
            None if grad_log_z is None else grad_log_z[part],
            with_codebook,
        )
        return grad_w, w.new_empty(0) if grad_codebook is None else grad_codebook.contiguous()

    grad_w, grad_codebooks = zip(*BCJR_BACKWARD.run(backward, w, spec), strict=True)
    return _joined(grad_w), sum(grad_codebooks[1:], start=grad_codebooks[0])


def _soft_backward_shapes(
    w: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    pins: Tensor | None,
    values: Tensor,
    grad_values: Tensor,
    grad_log_z: Tensor | None,
    L: int,
    k: int,
    V: int,
    with_codebook: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    grad_codebook = codebook.new_empty(codebook.shape if with_codebook else 0)
    return w.new_empty(w.shape), grad_codebook


torch.library.register_fake("softtrellis::soft_backward", _soft_backward_shapes)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    w, codebook, temperature, pins, *ctx.trellis, _, ctx.backend = inputs
    values, _, entropy = output
    ctx.save_for_backward(w, codebook, temperature, pins, values)
    ctx.mark_non_differentiable(entropy)


def _gradients(
    ctx: Any, grad_values: Tensor, grad_log_z: Tensor | None, *, with_codebook: bool
) -> tuple[Tensor, Tensor | None]:
    """Of the weights, and of the codebook where it needs one."""
    grad_w, grad_codebook = torch.ops.softtrellis.soft_backward(
        *ctx.saved_tensors, grad_values, grad_log_z, *ctx.trellis, with_codebook, ctx.backend
    )
    return grad_w, grad_codebook if with_codebook else None


def _differentiate(
    ctx: Any, grad_values: Tensor, grad_log_z: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    with_codebook = ctx.needs_input_grad[1]
    return *_gradients(ctx, grad_values, grad_log_z, with_codebook=with_codebook), *[None] * 7


def _refuse_to_differentiate(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("bcjr can be differentiated only once: it has no second derivatives")


torch.library.register_autograd(
    "softtrellis::soft_forward", _differentiate, setup_context=_save_for_backward
)
torch.library.register_autograd("softtrellis::soft_backward", _refuse_to_differentiate)


torch.library.define(
    "softtrellis::pass_back",
    "(Tensor values, Tensor w, Tensor codebook, Tensor temperature, Tensor? pins, int L, int k, "
    "int V, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("softtrellis::pass_back", "default")
def _pass_back(
    values: Tensor,
    w: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    pins: Tensor | None,
    L: int,
    k: int,
    V: int,
    backend: Backend,
) -> Tensor:
    """The values; what matters is the gradient, of a backend that can run."""
    resolve_backend(backend, w)
    return values.clone(memory_format=torch.contiguous_format)


def _pass_back_shape(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(values.shape)


torch.library.register_fake("softtrellis::pass_back", _pass_back_shape)


def _save_for_passing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, w, codebook, temperature, pins, *ctx.trellis, ctx.backend = inputs
    ctx.save_for_backward(w, codebook, temperature, pins, output)


def _pass(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
    with_codebook = ctx.needs_input_grad[2]
    return None, *_gradients(ctx, grad_values, None, with_codebook=with_codebook), *[None] * 6


torch.library.register_autograd("softtrellis::pass_back", _pass, setup_context=_save_for_passing)
