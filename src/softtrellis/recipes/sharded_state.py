"""The state of a run on several ranks, in the form that one process gives it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.recipes.ranks import Ranks


def gathered(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LatentLinear], ranks: Ranks
) -> dict[str, Tensor]:
    """A state with latent weights, their moments and pins whole; on rank 0, on the CPU.

    A run then goes on from it with any number of ranks. One layer at a time is whole on the
    device; rank 0's memory holds all.

    Args:
        tensors: by name; those of ``layers`` are "LAYER.latent", "LAYER.latent.MOMENT" and
            "LAYER.pins", of this rank's tiles.
        layers: by name.
        ranks: that share the layers; all call this together.

    Returns:
        The tensors by the same names; nothing on other ranks.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _layer_of(name, layers)
        whole = tensor
        if layer is not None and layer.share is not None and tensor.ndim:
            own = tensor.detach()
            whole = layer.whole(own) if own.ndim == 3 else layer.share.gather(own)
        if ranks.first:
            found[name] = whole.detach().cpu()
    return found


def own_part(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LatentLinear]
) -> dict[str, Tensor]:
    """This rank's part of what ``gathered`` gave, or of the state that one process saved."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _layer_of(name, layers)
        if layer is not None and layer.share is not None and tensor.ndim:
            tensor = layer.own(tensor) if tensor.ndim == 2 else tensor[layer.share.owned]
        found[name] = tensor
    return found


def _layer_of(name: str, layers: Mapping[str, LatentLinear]) -> LatentLinear | None:
    """The layer whose latent weights, their moments or whose pins have this name."""
    latent, found, _ = name.partition(".latent")
    return layers.get(latent if found else name.removesuffix(".pins"))
