"""Distillation losses over the full vocabulary, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNKS = {"cpu": 256, "cuda": 2048}
"""Positions whose logits are held at once, by type of device."""

Head = Callable[[Tensor], Tensor]
"""Hidden states [n, d] to logits [n, vocabulary]."""


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
            log_p = torch.log_softmax(target_head(target[part]).float(), -1)
            leaf = hidden[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head(leaf)
            log_q = torch.log_softmax(logits.detach().float(), -1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum(dtype=torch.float64)
            if gradient is not None:  # of the logits it is q - p
                slope = log_q.exp_().sub_(p).to(logits.dtype)
                (gradient[part],) = torch.autograd.grad(logits, leaf, slope)
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
