"""Optimizers, and the state of one as named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from softtrellis.extras import install

OptimizerName = Literal["adamw", "adamw8bit"]
BETAS = (0.9, 0.95)


def check_optimizer(name: str) -> None:
    """ValueError if the optimizer is unknown."""
    if name not in get_args(OptimizerName):
        raise ValueError(
            f"unknown optimizer {name!r}; use one of {', '.join(get_args(OptimizerName))}"
        )


def check_installed(name: OptimizerName) -> None:
    """ImportError if the optimizer's package is missing."""
    if name == "adamw8bit" and find_spec("torchao") is None:
        raise ImportError(f"optimizer adamw8bit needs torchao; {install('optim')}; or use adamw")


def make_optimizer(
    name: OptimizerName, groups: list[dict[str, Any]], *, fused: bool
) -> torch.optim.Optimizer:
    """AdamW without weight decay, betas 0.9 and 0.95, over groups with their own ``lr``.

    Args:
        name: "adamw", or "adamw8bit" of torchao, whose moments take a byte each.
        groups: parameter groups.
        fused: one kernel per step.

    Raises:
        ImportError: "adamw8bit" without torchao.
    """
    check_installed(name)
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=fused)
    from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=BETAS, weight_decay=0.0)
    return optimizer


def size_of(parameter: Tensor) -> float:
    """The root mean square that rates are over; 1 of a parameter of zeros."""
    return float(parameter.detach().float().square().mean().sqrt()) or 1.0


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Gives every group its learning rate."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's state of named parameters, as "NAME.KEY"; no copies."""
    return {
        f"{name}.{key}{part}": tensor
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        for part, tensor in _parts(value)
    }


def _parts(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor is made of: itself, or codes and scales of 8-bit moments."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield f".{name}", getattr(value, name)
    else:
        yield "", value


@torch.no_grad()
def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Takes over what ``optimizer_tensors`` gave; tensors of other names are left alone.

    A parameter that had no gradient yet has no state, and gets none.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for name, parameter in parameters.items():
        if f"{name}.step" in tensors:
            parameter.grad = torch.zeros_like(parameter)
    set_learning_rates(optimizer, [0.0] * len(rates))
    optimizer.step()  # makes the state, and with a rate of 0 changes nothing
    set_learning_rates(optimizer, rates)
    optimizer.zero_grad()
    for name, own in optimizer_tensors(optimizer, parameters).items():
        own.copy_(tensors[name])


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """float64 [], the norm of all gradients together."""
    found = _gradients(parameters)
    if not found:
        return torch.zeros((), dtype=torch.float64)
    norm: Tensor = torch.stack(torch._foreach_norm(found, 2, torch.float64)).norm()
    return norm


def scale_gradients_(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies all gradients by a number."""
    found = _gradients(parameters)
    if found:
        torch._foreach_mul_(found, factor)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
