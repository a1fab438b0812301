"""BCJR's part of the gradients of hard codes, computed for some layers a step, in turn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.latent_stacks import batches, jacobian_products
from softtrellis.quantizers.soft import HARD_VALUED, Estimator

_SUM, _STEPS, _PART = "latent.bcjr_sum", "latent.steps_summed", "latent.bcjr_part"


class BcjrTurns:
    """Puts BCJR's part into the latents' gradients; every layer has it made anew in its turn.

    A hard code needs BCJR for its gradient alone, (1 - m) g + m J g with the upstream gradient g
    and the Jacobian J of the Boltzmann average. J is linear, and changes as slowly as latents and
    temperature do: so J times the mean of g since a layer's last turn stands for J g until its next
    one, and BCJR takes ``stride`` times less. Beyond the paper: docs/mathematics.md, section 10.

    Attributes:
        layers: that are trained, by name.
        stride: steps from a layer's turn to its next; with 1 layers have their estimators' own
            gradients, and nothing is left to do.
        mix: m of "mixed"; that of "straight_through" is 1.
    """

    def __init__(self, layers: Mapping[str, LatentLinear], stride: int, mix: float) -> None:
        self.layers, self.stride, self.mix = dict(layers), stride, mix
        self._mixed = 0.0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._parts: dict[str, Tensor] = {}

    def train_by(self, estimator: Estimator) -> None:
        """Sets the layers' estimator: "identity" where it is left to ``mix_`` to add the rest."""
        ours = self.stride > 1 and estimator in HARD_VALUED
        self._mixed = (self.mix if estimator == "mixed" else 1.0) if ours else 0.0
        for layer in self.layers.values():
            layer.estimator = "identity" if ours else estimator

    @torch.no_grad()
    def mix_(self, step: int) -> None:
        """Changes the gradients g of all latents to (1 - m) g and m times BCJR's part.

        Args:
            step: whose turn it is; layers have their first one in the first call.
        """
        if not self._mixed:
            return
        latents = {name: layer.latent for name, layer in self.layers.items()}
        found = {name: x.grad for name, x in latents.items() if x.grad is not None}
        due = set(list(self.layers)[step % self.stride :: self.stride])
        for name in found.keys() - self._parts.keys():
            self._sums[name] = torch.zeros_like(latents[name])
            self._parts[name] = torch.zeros_like(latents[name])
            self._counts[name] = 0
            due.add(name)
        gradients = list(found.values())
        torch._foreach_add_([self._sums[name] for name in found], gradients)
        for name in found:
            self._counts[name] += 1
        self._renew([name for name in self.layers if name in due and self._counts.get(name)])
        torch._foreach_mul_(gradients, 1 - self._mixed)
        torch._foreach_add_(gradients, [self._parts[name] for name in found], alpha=self._mixed)

    def _renew(self, due: list[str]) -> None:
        names = {id(self.layers[name]): name for name in due}
        for batch in batches(self.layers[name] for name in due):
            own = [names[id(layer)] for layer in batch]
            means = [self._sums[name] / self._counts[name] for name in own]
            for name, part in zip(own, jacobian_products(batch, means), strict=True):
                self._parts[name].copy_(part)
                self._sums[name].zero_()
                self._counts[name] = 0

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name; of ranks that share layers the own part."""
        tensors: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            tensors[f"{name}.{_SUM}"], tensors[f"{name}.{_PART}"] = self._sums[name], part
            tensors[f"{name}.{_STEPS}"] = torch.tensor(self._counts[name])
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what ``state`` gave."""
        for name, layer in self.layers.items():
            if (part := tensors.get(f"{name}.{_PART}")) is not None:
                self._parts[name] = part.to(layer.latent.device, copy=True)
                sums = tensors[f"{name}.{_SUM}"]
                self._sums[name] = sums.to(layer.latent.device, copy=True)
                self._counts[name] = int(tensors[f"{name}.{_STEPS}"])
