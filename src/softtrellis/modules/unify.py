"""Making linear layers that are stored in another way plain ``nn.Linear`` modules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional


def linear_of(weight: Tensor, bias: Tensor | None, *, like: nn.Module) -> nn.Linear:
    """An ``nn.Linear`` with copies of weight [out, in] and bias [out], of their dtype and device.

    ``like``, the module that holds them, says whether it is in training mode and takes gradients.
    """
    trains = any(parameter.requires_grad for parameter in like.parameters(recurse=False))
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(_copy(weight), requires_grad=trains)
    if bias is not None:
        linear.bias = nn.Parameter(_copy(bias), requires_grad=trains)
    return linear.train(like.training)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, which holds its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is an ``nn.Linear`` that computes x Wᵀ + b.

    Subclasses that have a forward of their own are tried on one random vector: a router that
    returns the experts that it chose, or a grouped projection, is no plain linear layer.
    """
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, module.in_features, generator=generator).to(weight)
    with torch.no_grad():
        expected = functional.linear(x, weight, module.bias)
        try:
            found = type(module).forward(module, x)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    tolerance = 8 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
    return bool(((found - expected).abs() <= tolerance).all())


def unify_linears_(model: nn.Module, names: Iterable[str]) -> None:
    """Exchanges each named ``Conv1D`` for an ``nn.Linear`` of the same function, in place.

    Names of other modules, and of modules that do not exist yet, are passed over: give it the
    names of all layers that are to be plain linear layers. The weight [out, in] is a copy.
    """
    wanted = set(names)
    found = [n for n, module in model.named_modules() if n in wanted and is_conv1d(module)]
    for name in found:
        module = model.get_submodule(name)
        weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
        model.set_submodule(name, linear_of(weight.T, bias, like=module))
