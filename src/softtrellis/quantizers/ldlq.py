"""LDLQ: quantize 16 input columns at a time and feed the error forward through the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16

EncodeColumns = Callable[[Tensor], Tensor]
"""Quantizes [out, 16] columns: returns their reproduction [out, 16]."""

_MAX_DAMPING_STEPS = 12
_FLOAT64_SIZE = 8192  # larger Hessians are factorised in float32, which takes half the memory


@dataclass(frozen=True, eq=False)
class Feedback:
    """Block LDL factor of a damped Hessian.

    Attributes:
        factor: [in, in], unit block lower triangular L with H = L D L^T.
        damping: what was added to the diagonal, over its mean.
    """

    factor: Tensor
    damping: float


def damped_cholesky(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Cholesky factor of a Hessian with something added to its diagonal.

    Channels that never fire (zero diagonal) get the mean diagonal, which leaves the others as they
    are. If the factorisation fails the damping grows tenfold until it succeeds.

    Args:
        hessian: [n, n], symmetric positive semi-definite.
        damping: added to the diagonal, as a share of its mean; > 0.

    Returns:
        Lower triangular [n, n], float64 up to n = 8192 and float32 above, and the damping.

    Raises:
        ValueError: a Hessian that is not finite, or that no damping makes positive definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian holds NaN or infinity; check the calibration activations")
    h = hessian.to(torch.float64 if len(hessian) <= _FLOAT64_SIZE else torch.float32, copy=True)
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        raise ValueError("the Hessian is zero: these inputs never fire on the calibration text")
    diagonal[diagonal <= 0] = mean
    added = 0.0
    for _ in range(_MAX_DAMPING_STEPS):
        diagonal.add_((damping - added) * mean)
        added = damping
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0:
            return lower, added
        damping *= 10.0
    raise ValueError("the Hessian is not positive semi-definite, whatever the damping")


def block_ldl(hessian: Tensor, damping: float) -> Feedback:
    """Block LDL decomposition by way of Cholesky (QuIP#, arXiv 2402.04396, section 4.1).

    Args:
        hessian: [in, in], symmetric positive semi-definite, in a multiple of 16.
        damping: see ``damped_cholesky``.

    Raises:
        ValueError: as ``damped_cholesky``.
    """
    size = hessian.shape[0]
    if size % BLOCK:
        raise ValueError(f"the Hessian's size must be a multiple of {BLOCK}, got {size}")
    lower, added = damped_cholesky(hessian, damping)
    corners = lower.reshape(size // BLOCK, BLOCK, size // BLOCK, BLOCK)
    corners = corners.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    identity = torch.eye(BLOCK, dtype=lower.dtype, device=lower.device).expand_as(corners)
    inverse = torch.linalg.solve_triangular(corners, identity, upper=False)
    columns = lower.reshape(size, size // BLOCK, BLOCK).transpose(0, 1)
    factor = torch.bmm(columns, inverse).transpose(0, 1).reshape(size, size)
    return Feedback(factor.to(hessian.dtype), added)


def ldlq(
    weight: Tensor,
    feedback: Feedback,
    encode: EncodeColumns,
    *,
    on_block: Callable[[], None] | None = None,
) -> Tensor:
    """Quantizes a weight matrix with error feedback (QTIP, section 4; QuIP#, section 4.1).

    Blocks of 16 input columns are taken from the last to the first; each is quantized after the
    errors already made, weighted by the factor, were added to it. The result minimises
    tr(E H E^T) greedily, with E = weight - result.

    Args:
        weight: [out, in].
        feedback: ``block_ldl`` of the inputs' Hessian.
        encode: quantizes [out, 16].
        on_block: called after each block, for progress.

    Returns:
        [out, in], the reproduction.
    """
    result = torch.empty_like(weight)
    error = torch.zeros_like(weight)
    for first in reversed(range(0, weight.shape[1], BLOCK)):
        here, later = slice(first, first + BLOCK), slice(first + BLOCK, None)
        target = weight[:, here] + error[:, later] @ feedback.factor[later, here]
        result[:, here] = encode(target)
        error[:, here] = weight[:, here] - result[:, here]
        if on_block is not None:
            on_block()
    return result


def proxy_loss(weight: Tensor, reproduction: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T): the share of the output's energy that is lost."""
    error = weight - reproduction
    lost = ((error @ hessian) * error).sum(dtype=torch.float64)
    energy = ((weight @ hessian) * weight).sum(dtype=torch.float64)
    return float(lost / energy.clamp_min(1e-300))
