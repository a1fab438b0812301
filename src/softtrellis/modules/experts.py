"""Mixture-of-experts weights in one 3-D tensor, and the same experts as plain linear layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from softtrellis.modules.unify import linear_of

DOWN = "down_proj"


@dataclass(frozen=True)
class ExpertLayout:
    """How a module holds E experts, each of two linear layers with an activation in between.

    Attributes:
        count: E.
        first: "gate_up_proj", weights [E, 2I, H], or "up_proj", [E, I, H], of experts without a
            gate. The second layer is "down_proj", [E, H, I].
        transposed: whether the last two dimensions are exchanged, [E, in, out].
        bias: whether there are biases [E, out], named "gate_up_proj_bias" and so on.
    """

    count: int
    first: str
    transposed: bool
    bias: bool

    def linear_names(self) -> list[str]:
        """The names that the experts' linear layers have inside ``UnfusedExperts``."""
        return [f"{e}.{name}" for e in range(self.count) for name in (self.first, DOWN)]


def expert_layout(module: nn.Module) -> ExpertLayout | None:
    """The layout of a module with fused experts, None for any other module.

    Recognised by what transformers' experts interface puts on such a module, whatever the model
    (``has_gate``, ``has_bias``, ``is_transposed``), and by weights that fit these.
    """
    flags = [getattr(module, flag, None) for flag in ("has_gate", "has_bias", "is_transposed")]
    if not all(isinstance(flag, bool) for flag in flags):
        return None
    gate, bias, transposed = map(bool, flags)
    first = "gate_up_proj" if gate else "up_proj"
    weights = dict(module.named_parameters(recurse=False))
    expected = {first, DOWN} | ({f"{first}_bias", f"{DOWN}_bias"} if bias else set())
    if weights.keys() != expected or any(weights[name].ndim != 3 for name in (first, DOWN)):
        return None
    (count, *up), (other, *down) = weights[first].shape, weights[DOWN].shape
    if transposed:
        up, down = up[::-1], down[::-1]
    if count != other or up[1] != down[0] or up[0] != down[1] * (2 if gate else 1):
        return None
    return ExpertLayout(count, first, transposed, bias)


def fused_weights(module: nn.Module) -> list[str]:
    """Names of a module's own parameters that hold a stack of matrices, convolutions aside."""
    if isinstance(module, _ConvNd):
        return []
    return [
        name
        for name, weight in module.named_parameters(recurse=False)
        if weight.is_floating_point() and weight.ndim >= 3 and min(weight.shape) > 1
    ]


class UnfusedExperts(nn.Module):
    """Experts as 2E plain linear layers, with the function of the module they come from.

    Expert e's layers are ``e.gate_up_proj`` (or ``e.up_proj``) and ``e.down_proj``. Only the
    tokens that are routed to an expert go through its layers: their forward hooks see exactly
    these, and an expert that no token is routed to is not called.

    Attributes:
        layout: of the module they come from.
        shell: that module without its weights; it knows the activation and the gate.
    """

    def __init__(self, fused: nn.Module, layout: ExpertLayout) -> None:
        """Copies the weights of ``fused``, whose ``expert_layout`` is ``layout``."""
        super().__init__()
        self.layout = layout
        self.shell = copy.copy(fused)
        self.shell._parameters = {}
        for e in range(layout.count):
            expert = {name: self._linear(fused, name, e) for name in (layout.first, DOWN)}
            self.add_module(str(e), nn.ModuleDict(expert))
        self.train(fused.training)

    def _linear(self, fused: nn.Module, name: str, e: int) -> nn.Linear:
        weight = fused.get_parameter(name)[e]
        bias = fused.get_parameter(f"{name}_bias")[e] if self.layout.bias else None
        return linear_of(weight.T if self.layout.transposed else weight, bias, like=fused)

    def _activate(self, x: Tensor) -> Tensor:
        if self.layout.first == "up_proj":
            activated: Tensor = self.shell.get_submodule("act_fn")(x)
        else:
            activated = self.shell._apply_gate(x)  # type: ignore[operator]
        return activated

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, H].
            top_k_index: int [tokens, k], from 0 to E - 1.
            top_k_weights: [tokens, k].

        Returns:
            [tokens, H], of the dtype of ``hidden_states``.
        """
        tokens, k = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        counts = torch.bincount(chosen, minlength=self.layout.count).tolist()
        slots = chosen.argsort(stable=True).split(counts)
        outputs = hidden_states.new_zeros(tokens * k, hidden_states.shape[-1])
        for e, slot in enumerate(slots):
            if slot.numel() == 0:
                continue
            x = self.get_submodule(f"{e}.{self.layout.first}")(hidden_states[slot // k])
            x = self.get_submodule(f"{e}.{DOWN}")(self._activate(x))
            if getattr(self.shell, "has_post_expert_norm", False):
                x = self.shell.get_submodule("post_expert_norm")(x)
            outputs[slot] = x.to(outputs.dtype)
        weighted = outputs * top_k_weights.reshape(-1, 1)
        summed = weighted.view(tokens, k, weighted.shape[-1]).sum(dim=1)
        return summed.to(hidden_states.dtype)


def unfuse_experts_(model: nn.Module, names: Iterable[str]) -> None:
    """Exchanges the fused experts that named linear layers lie in for ``UnfusedExperts``, in place.

    Args:
        model: holds modules with an ``expert_layout``.
        names: of linear layers, as ``UnfusedExperts`` names them (``experts.3.gate_up_proj``);
            names of other layers are passed over.
    """
    wanted = set(names)
    # Names and layouts only: the fused weights of a module are freed before the next is copied.
    layouts = {name: expert_layout(module) for name, module in model.named_modules()}
    for name, layout in layouts.items():
        if layout and not wanted.isdisjoint(f"{name}.{each}" for each in layout.linear_names()):
            model.set_submodule(name, UnfusedExperts(model.get_submodule(name), layout))


def expert_groups(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Those of the named layers that are experts, by module and projection.

    Returns:
        Lists of names; the keys are such as ``model.layers.0.mlp.experts.gate_up_proj``.
    """
    wanted = set(names)
    groups: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, UnfusedExperts):
            continue
        for each in module.layout.linear_names():
            if f"{prefix}.{each}" in wanted:
                key = f"{prefix}.{each.partition('.')[2]}"
                groups.setdefault(key, []).append(f"{prefix}.{each}")
    return groups
