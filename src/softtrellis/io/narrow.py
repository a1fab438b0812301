"""Dense float32 tensors stored as bfloat16, where it holds every number of them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from softtrellis.io.manifest import CheckpointError
from softtrellis.modules.quantized_linear import QuantizedLinear

_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)
"""Where the halves of a float32 are in memory."""


def packed_names(layers: Mapping[str, QuantizedLinear]) -> set[str]:
    """Names of the tensors that are stored as they are: all of the layers but their biases."""
    stored = {name: layer.state_dict().keys() - {"bias"} for name, layer in layers.items()}
    return {f"{name}.{key}" for name, keys in stored.items() for key in keys}


def narrowed(tensor: Tensor) -> Tensor | None:
    """A float32 tensor in bfloat16, on the CPU; None if a bit would be lost.

    A bfloat16 is the upper half of a float32, so a tensor is held if all lower halves are zero. The
    halves are copied, since rounding makes other bits of NaNs.
    """
    halves = tensor.reshape(-1, 1).view(torch.int16)
    if halves[:, _LOW].any():
        return None
    return halves[:, _HIGH].contiguous().cpu().view(torch.bfloat16).reshape(tensor.shape)


def narrow_(tensors: dict[str, Tensor], packed: Collection[str]) -> list[str]:
    """Exchanges float32 tensors for bfloat16 ones that hold the same numbers, one at a time.

    Args:
        tensors: by name; those that share memory still do afterwards. What is on the device "meta"
            is left as it is.
        packed: names to be left as they are.

    Returns:
        The names of those exchanged, sorted.
    """
    places = {
        name: (tensor.data_ptr(), tensor.shape, tensor.stride())
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float32 and not tensor.is_meta and name not in packed
    }
    smaller: dict[object, Tensor | None] = {}
    for name, place in places.items():
        if place not in smaller:
            smaller[place] = narrowed(tensors[name])
        half = smaller[place]
        if half is not None:
            tensors[name] = half
    return sorted(name for name, place in places.items() if smaller[place] is not None)


def widened(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The tensors with those of these names in float32 again.

    Raises:
        CheckpointError: one of them is missing, or is not bfloat16.
    """
    for name in names:
        if name not in tensors:
            raise CheckpointError(f"the checkpoint lacks {name}; copy it again")
        if tensors[name].dtype != torch.bfloat16:
            raise CheckpointError(
                f"{name} is {tensors[name].dtype} and must be bfloat16; copy the checkpoint again"
            )
    return {**tensors, **{name: tensors[name].float() for name in names}}
