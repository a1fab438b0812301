"""Weights that make up for what the quantization of the layers before did to their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from softtrellis.quantizers.ldlq import damped_cholesky


def corrected_weight(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """The weight whose outputs on the quantized model's inputs are nearest to the original ones.

    With x the inputs in the original model and x' those behind quantized layers, it minimises
    E |W x - W' x'|^2 + lambda |W' - W|^2, so W' = W + W (E[x x'^T] - H) (H + lambda)^-1 with
    H = E[x' x'^T] (GPTAQ, arXiv 2504.02692, section 3, as one least-squares problem before
    quantization).

    Args:
        weight: [out, in].
        hessian: [in, in], E[x' x'^T].
        cross: [in, in], E[x x'^T].
        damping: lambda as a share of the mean of the diagonal of H, see ``damped_cholesky``.

    Returns:
        [out, in].

    Raises:
        ValueError: moments that are not finite, or inputs that are all zero.
    """
    if not bool(torch.isfinite(cross).all()):
        raise ValueError("the inputs' moments hold NaN or infinity; check the calibration text")
    lower, _ = damped_cholesky(hessian, damping)
    change = weight @ (cross - hessian)
    solved: Tensor = torch.cholesky_solve(change.T.to(lower.dtype), lower).T
    return weight + solved.to(weight.dtype)
