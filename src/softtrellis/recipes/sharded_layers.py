"""Decoder layers of a student whose codewords several ranks share (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.replace import decoder_index, decoder_layers
from softtrellis.recipes.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class ShardedLayers(nn.Module):
    """The decoder layers with training layers, gathered one at a time.

    Every rank stores the codewords of its own tiles, and their gradient. ``fully_shard`` gathers
    those of a decoder layer before it runs, forward and backward, drops them afterwards, and adds
    up the ranks' gradients of them, each sum on the rank that owns the tiles. That happens in every
    pass: gradients that waited for the last one of a step would be whole on every rank.

    Passes through the student must go through this module, on all ranks together, so that its
    decoder layers are gathered while the one before them computes.
    """

    def __init__(
        self,
        student: nn.Module,
        names: Sequence[str],
        ranks: Ranks,
        *,
        dtype: torch.dtype,
    ) -> None:
        """Takes the place of the decoder layers that the named layers are in, until ``undo``.

        Args:
            student: holds the layers.
            names: of the layers that will be trained.
            ranks: two or more.
            dtype: that codewords are gathered in, and that their gradients have before they are
                added up in float32. bfloat16 halves what travels.
        """
        super().__init__()
        assert ranks.mesh is not None
        self._mesh, self._dtype = ranks.mesh, dtype
        layers = decoder_layers(student)[1]
        self._all = [layers]  # in a list, so that it is no submodule
        indices = sorted({decoder_index(student, name) for name in names})
        self._originals = {index: layers[index] for index in indices}
        for index, layer in self._originals.items():
            layers[index] = _twin(layer)
        self._units = nn.ModuleList([layers[index] for index in indices])

    def shard(self) -> None:
        """Spreads the codewords of one more decoder layer, whose ``LatentLinear`` are in place.

        A parameter of codewords that requires no gradient now never gets one.
        """
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        unit = next(unit for unit in self._units if not isinstance(unit, FSDPModule))
        inside = [module for module in unit.modules() if isinstance(module, LatentLinear)]
        _reach_all_(unit, inside)
        codewords = {id(layer.codewords) for layer in inside}
        sharded = fully_shard(
            unit,
            mesh=self._mesh,
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=self._dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            ignored_params={p for p in unit.parameters() if id(p) not in codewords},
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
        if unit is self._units[-1]:
            fully_shard(self, mesh=self._mesh, ignored_params=set(self.parameters()))

    def forward(self, run: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """``run(states)``, a pass through the student; all ranks call it together."""
        return run(states).clone()  # FSDP2's hooks on a view would be lost where that is changed

    def units(self) -> list[FSDPModule]:
        """The decoder layers, each gathered and dropped as one; after ``shard`` of all."""
        return [cast("FSDPModule", unit) for unit in self._units]

    def undo(self) -> None:
        """Puts the student's own decoder layers back."""
        (layers,) = self._all
        for index, layer in self._originals.items():
            layers[index] = layer


def _twin(layer: nn.Module) -> nn.Module:
    """A module of the same submodules and parameters, which gets hooks of its own."""
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            vars(twin)[name] = copy.copy(value)
    return twin


def _reach_all_(unit: nn.Module, inside: Sequence[LatentLinear]) -> None:
    """Gives training layers that a pass does not call gradients of zero.

    Experts that no token is routed to, for instance: every rank must have the same gradients to
    add up.
    """
    before: list[int] = []

    def note(*_: Any) -> None:
        before[:] = [layer.calls for layer in inside]

    def reach(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        idle = [
            layer.codewords
            for layer, calls in zip(inside, before, strict=True)
            if layer.calls == calls and layer.codewords is not None
        ]
        if not torch.is_grad_enabled() or not any(each.requires_grad for each in idle):
            return output
        if isinstance(output, Tensor):
            return _Unused.apply(output, *idle)  # type: ignore[no-untyped-call]
        hidden, *others = output
        return type(output)((_Unused.apply(hidden, *idle), *others))  # type: ignore[no-untyped-call]

    unit.register_forward_pre_hook(note)
    unit.register_forward_hook(reach)


class _Unused(torch.autograd.Function):
    """Hidden states, as a function of tensors that they do not depend on."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *unused: Tensor) -> Tensor:
        ctx.like = [(each.shape, each.dtype) for each in unused]
        return hidden.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=kind, device=grad.device) for shape, kind in ctx.like)
        return grad, *zeros
