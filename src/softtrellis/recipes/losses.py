"""Distillation losses over the full vocabulary, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softtrellis.backend import Backend, resolve_backend

CHUNKS = {"cpu": 256, "cuda": 2048}
"""Positions whose logits are held at once, by type of device."""

Head = Callable[[Tensor], Tensor]
"""Hidden states [n, d] to logits [n, vocabulary]."""


def kl_of_logits(
    p: Tensor, q: Tensor, *, slope: bool, backend: Backend = "auto"
) -> tuple[Tensor, Tensor | None]:
    """KL(softmax(p) || softmax(q)) of rows, in nats, and what it does with q.

    Args:
        p: float32 [n, vocabulary], logits.
        q: float32 [n, vocabulary], logits.
        slope: also return the derivative.
        backend: "triton" and "cuda" are one kernel, which "auto" takes on a GPU.

    Returns:
        float32 [n], and the derivative of each by its row of q, softmax(q) - softmax(p), float32
        [n, vocabulary], or None.
    """
    if resolve_backend(backend, p) in ("triton", "cuda"):
        from softtrellis.recipes import losses_triton

        return losses_triton.kl_of_logits(p, q, slope=slope)
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    likely = log_p.exp()
    divergence = log_p.sub_(log_q).mul_(likely).sum(-1)
    return divergence, log_q.exp_().sub_(likely) if slope else None


class _ForwardKL(torch.autograd.Function):
    """Computes each chunk's gradient with its loss, so that no logits outlive their chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, target: Tensor, target_head: Head, chunk: int
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        for first in range(0, hidden.shape[0], chunk):
            part = slice(first, first + chunk)
            leaf = hidden[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(leaf)
            target_logits = target_head(target[part]).float()
            divergence, slope = kl_of_logits(target_logits, logits.detach().float(), slope=wanted)
            total += divergence.sum(dtype=torch.float64)
            if gradient is not None and slope is not None:
                (gradient[part],) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
        if gradient is not None:
            ctx.save_for_backward(gradient / hidden.shape[0])
        return (total / hidden.shape[0]).to(torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(gradient.dtype), None, None, None, None


def forward_kl(
    hidden: Tensor, head: Head, target: Tensor, target_head: Head, *, chunk: int = 256
) -> Tensor:
    """Mean KL(teacher || student) per position, in nats, over the full vocabulary.

    Logits exist for one chunk of positions at a time. The gradient reaches ``hidden`` only: both
    heads are taken as frozen.

    Args:
        hidden: [n, d], the student's last hidden states.
        head: the student's output layer.
        target: [n, d'], the teacher's last hidden states.
        target_head: the teacher's output layer.
        chunk: positions per chunk.

    Returns:
        float32 [].
    """
    with torch.no_grad():
        target = target.detach()
    loss: Tensor = _ForwardKL.apply(hidden, head, target, target_head, chunk)  # type: ignore[no-untyped-call]
    return loss
