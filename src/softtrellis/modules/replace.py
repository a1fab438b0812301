"""Finding a model's linear layers, and exchanging them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import nn

from softtrellis.modules.experts import expert_layout, fused_weights, unfuse_experts_
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.unify import is_conv1d, is_plain_linear, unify_linears_


class UnknownLayerError(ValueError):
    """A pattern that names no layer."""


class UnsupportedLayerError(UnknownLayerError):
    """A choice with weights in it that no linear layers can be made of."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the repeated decoder layers: the ModuleList with the most weights.

    Lists inside another list, of experts for instance, are part of a layer.

    Raises:
        ValueError: a model without repeated layers.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            lists[name] = module
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers to quantize")
    return max(lists.items(), key=lambda item: _weights(item[1]))


def _weights(module: nn.Module) -> int:
    quantized = (m for m in module.modules() if isinstance(m, QuantizedLinear))
    return sum(parameter.numel() for parameter in module.parameters()) + sum(
        linear.in_features * linear.out_features for linear in quantized
    )


def decoder_index(model: nn.Module, name: str) -> int:
    """The number of the decoder layer that a module named ``name`` belongs to."""
    module, parts = model, name.split(".")
    for here, below in pairwise(parts):
        module = module.get_submodule(here)
        if isinstance(module, nn.ModuleList):
            return int(below)
    raise ValueError(f"{name} is in no decoder layer")


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers inside the decoder layers, in the order they run.

    A linear layer is a ``QuantizedLinear``, a plain ``nn.Linear``, a ``Conv1D``, or one of a
    module of fused experts; ``prepare_for_layers_`` makes the last two plain ones of these names.
    """
    prefix, layers = decoder_layers(model)
    names: list[str] = []
    for name, module in layers.named_modules(prefix=prefix):
        if isinstance(module, QuantizedLinear) or is_plain_linear(module) or is_conv1d(module):
            names.append(name)
        elif layout := expert_layout(module):
            names += [f"{name}.{each}" for each in layout.linear_names()]
    return names


def prepare_for_layers_(model: nn.Module, names: Iterable[str]) -> None:
    """Makes the named linear layers exist as plain ``nn.Linear`` modules, in place.

    Each ``Conv1D`` among them is exchanged, and each module of fused experts that one of them
    belongs to; the model's outputs stay the same to rounding. Everything else stays as it is, so
    that the names of the quantized layers alone say how a checkpoint names its tensors.

    Args:
        model: a model in full precision.
        names: from ``linear_names`` or ``select_layers``, or of a checkpoint's layers.
    """
    names = list(names)
    unify_linears_(model, names)
    unfuse_experts_(model, names)


def _unsupported(model: nn.Module) -> dict[str, str]:
    """Stacks of matrices of an unknown layout in the decoder layers: description by name."""
    prefix, layers = decoder_layers(model)
    return {
        f"{name}.{weight}": f"{type(module).__name__}, {list(module.get_parameter(weight).shape)}"
        for name, module in layers.named_modules(prefix=prefix)
        if expert_layout(module) is None
        for weight in fused_weights(module)
    }


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The dense linear layer of that name.

    Raises:
        ValueError: it is something else, a quantized layer for instance.
    """
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name} is a {type(module).__name__}, not a dense linear layer")
    return module


def output_layer(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, where the model has one and names it."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def head_name(model: nn.Module) -> str:
    """The name of the output layer; ValueError if that is no linear layer."""
    head = output_layer(model)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the output layer of {type(model).__name__} is not a linear layer")
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[head]


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
        UnsupportedLayerError: fused experts among them of a layout that is not known.
    """
    names, unsupported = linear_names(model), _unsupported(model)
    everything = [*names, *unsupported]
    prefix, layers = decoder_layers(model)
    chosen: set[str] = set(everything if patterns is None else ())
    for pattern in patterns or ():
        found = {name for name in everything if _matches(name, pattern, prefix)}
        if not found:
            raise UnknownLayerError(
                f"no linear layer matches {pattern!r}; the model has decoder layers 0 to "
                f"{len(layers) - 1} with names such as {everything[0]}"
            )
        chosen |= found
    refused = [f"{name} ({what})" for name, what in unsupported.items() if name in chosen]
    if refused:
        raise UnsupportedLayerError(
            f"no linear layers can be made of {', '.join(refused[:4])}"
            f"{', ...' if len(refused) > 4 else ''}; choose layers without them, such as "
            f"{names[0] if names else 'those of another model'}, and they stay in full precision"
        )
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


def share_codebooks_(model: nn.Module) -> None:
    """Lets quantized layers use the codebook of the first of their code and device."""
    known: dict[tuple[object, object], QuantizedLinear] = {}
    for module in quantized_layers(model).values():
        first = known.setdefault((module.layer.code, module.codes.device), module)
        module.codebook, module.table = first.codebook, first.table


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def check_no_adapters(model: nn.Module) -> None:
    """ValueError for a model with peft's adapters on it, in which layers have other names."""
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise ValueError(
            "the model has adapters on it, and a checkpoint cannot hold them: write the adapters "
            "with save_pretrained of peft's model, or the packed model after unload() of that"
        )


def cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and biases to a dtype; codes, scales and other buffers stay as they are.

    So do the frequencies of rotary positions, which ``model.to(dtype)`` rounds.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.to(dtype)
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def hold_weights_(model: nn.Module, dtype: torch.dtype) -> None:
    """Decodes every quantized layer once: as much memory as the dense model, and its speed."""
    for layer in quantized_layers(model).values():
        layer.hold(dtype)


def release_weights_(model: nn.Module) -> None:
    """Undoes ``hold_weights_``."""
    for layer in quantized_layers(model).values():
        layer.release()


@contextmanager
def weights_held(module: nn.Module) -> Iterator[None]:
    """Decodes quantized layers once, in float32, for all passes in the context."""
    hold_weights_(module, torch.float32)
    try:
        yield
    finally:
        release_weights_(module)


def dequantize_(model: nn.Module) -> None:
    """Exchanges every quantized layer for a dense one with the same weight, in place."""
    layers = quantized_layers(model)
    replace_modules(model, layers, lambda name, _: layers[name].dequantize())


@contextmanager
def on_device(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """A module on a device, and back where it was afterwards."""
    home = next(module.parameters(), torch.empty(0)).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)
