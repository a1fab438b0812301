"""Second moments of the inputs of linear layers, by streaming forward hooks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from softtrellis.io.progress import progress
from softtrellis.modules.replace import decoder_index, get_linear
from softtrellis.modules.tail import run_prefix, stop_before


def check_finite(model: nn.Module) -> None:
    """ValueError, naming the tensor, if a weight of the model is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name} holds NaN or infinity; repair the model first")


class HessianHook:
    """Accumulates sum x x^T over the inputs of one linear layer."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.count = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().reshape(-1, self.total.shape[0]).to(torch.float32)
        self.total.addmm_(x.T, x)
        self.count += x.shape[0]

    def hessian(self) -> Tensor:
        """float32 [in, in], E[x x^T]."""
        return self.total / max(1, self.count)


@torch.no_grad()
def collect_hessians(
    model: nn.Module, names: Sequence[str], windows: Tensor, *, show_progress: bool = False
) -> dict[str, Tensor]:
    """H = E[x x^T] of the inputs of linear layers (QTIP, section 4).

    Layers behind the last one named are not run.

    Args:
        model: a causal language model.
        names: linear layers in its decoder layers.
        windows: int64 [n, ctx].
        show_progress: show a progress bar.

    Returns:
        float32 [in, in] by name.

    Raises:
        ValueError: activations with NaN or infinity, named by layer.
    """
    device = next(model.parameters()).device
    last = max(decoder_index(model, name) for name in names)
    hooks: dict[str, HessianHook] = {}
    with ExitStack() as stack:
        stack.enter_context(stop_before(model, last + 1))
        for name in names:
            linear = get_linear(model, name)
            hooks[name] = HessianHook(linear.in_features, device)
            stack.callback(linear.register_forward_pre_hook(hooks[name]).remove)
        for window in progress(windows, "calibrate", enabled=show_progress):
            run_prefix(model, window[None].to(device))
    hessians = {name: hook.hessian() for name, hook in hooks.items()}
    for name, hessian in hessians.items():
        if not bool(torch.isfinite(hessian).all()):
            raise ValueError(f"the inputs of {name} hold NaN or infinity on the calibration text")
    return hessians
