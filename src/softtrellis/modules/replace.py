"""Finding a model's linear layers, and exchanging them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from softtrellis.modules.quantized_linear import QuantizedLinear


class UnknownLayerError(ValueError):
    """A pattern that names no layer."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the repeated decoder layers: the longest ModuleList of one class.

    Raises:
        ValueError: a model without repeated layers.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers to quantize")
    return max(lists, key=lambda item: len(item[1]))


def decoder_index(model: nn.Module, name: str) -> int:
    """The number of the decoder layer that a module named ``name`` belongs to."""
    prefix, _ = decoder_layers(model)
    return int(name[len(prefix) + 1 :].split(".")[0])


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers inside the decoder layers, in the order they run."""
    prefix, layers = decoder_layers(model)
    return [
        f"{prefix}.{name}"
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear)
    ]


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The dense linear layer of that name.

    Raises:
        ValueError: it is something else, a quantized layer for instance.
    """
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name} is a {type(module).__name__}, not a dense linear layer")
    return module


def get_quantized(model: nn.Module, name: str) -> QuantizedLinear:
    """The quantized layer of that name; ValueError if it is something else."""
    module = model.get_submodule(name)
    if not isinstance(module, QuantizedLinear):
        raise ValueError(f"{name} is a {type(module).__name__}, not a quantized layer")
    return module


def select_layers(model: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """The linear layers that patterns name.

    A pattern is a decoder layer's number ("28"), a range of them ("10-12"), a name or the end of
    one ("layers.28.mlp.down_proj", "down_proj"), or a shell pattern ("*.mlp.*"). None is all.

    Raises:
        UnknownLayerError: a pattern that names nothing, with some of the names that there are.
    """
    names = linear_names(model)
    if patterns is None:
        return names
    prefix, layers = decoder_layers(model)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if _matches(name, pattern, prefix)}
        if not found:
            raise UnknownLayerError(
                f"no linear layer matches {pattern!r}; the model has decoder layers 0 to "
                f"{len(layers) - 1} with names such as {names[0]}"
            )
        chosen |= found
    return [name for name in names if name in chosen]


def _matches(name: str, pattern: str, prefix: str) -> bool:
    number = int(name[len(prefix) + 1 :].split(".")[0])
    first, dash, last = pattern.partition("-")
    if first.isdecimal() and (not dash or last.isdecimal()):
        return int(first) <= number <= int(last or first)
    return name == pattern or name.endswith("." + pattern) or fnmatchcase(name, pattern)


def replace_modules(
    model: nn.Module, names: Iterable[str], make: Callable[[str, nn.Module], nn.Module]
) -> None:
    """Puts ``make(name, module)`` in the place of every named module."""
    for name in names:
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, child, make(name, holder.get_submodule(child)))


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def dequantize_(model: nn.Module) -> None:
    """Exchanges every quantized layer for a dense one with the same weight, in place."""
    layers = quantized_layers(model)
    replace_modules(model, layers, lambda name, _: layers[name].dequantize())
