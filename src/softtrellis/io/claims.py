"""What a model's configuration may claim, before memory is taken for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softtrellis.io.manifest import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_BUFFERS = 1 << 26
"""Numbers in tables that a small model computes for itself, of positions for instance."""

_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_layer_count(settings: Mapping[str, Any], tensors: int) -> None:
    """CheckpointError if config.json has no type of model, or too many layers for the files."""
    if not isinstance(settings.get("model_type"), str):
        raise CheckpointError("config.json has no model_type; copy the model again")
    for key in _COUNTS:
        count = settings.get(key, 1)
        if not isinstance(count, int) or not 1 <= count <= tensors:
            raise CheckpointError(
                f"config.json has {key} {count!r}, and the files {tensors} tensors; "
                "they do not fit together"
            )


def check_buffers(skeleton: PreTrainedModel) -> None:
    """CheckpointError if a model on the device "meta" would compute large tables for itself."""
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    buffers = sum(buffer.numel() for buffer in skeleton.buffers())
    if buffers > MOST_BUFFERS + 4 * parameters:
        raise CheckpointError(
            f"config.json asks for tables of {buffers:,} numbers beside {parameters:,} "
            "weights; do not use this model"
        )


def check_dtype(name: str, found: torch.dtype, wanted: torch.dtype) -> None:
    """CheckpointError for a dense tensor of another dtype; floats are all alike."""
    if found != wanted and not (found in _FLOATS and wanted in _FLOATS):
        raise CheckpointError(f"{name} is {found} and must be {wanted}; copy the checkpoint again")


def check_packed(name: str, tensor: Tensor, wanted: torch.dtype) -> None:
    """CheckpointError for a packed tensor of another dtype, or a scale that is not finite."""
    if tensor.dtype != wanted:
        raise CheckpointError(
            f"{name} is {tensor.dtype} and must be {wanted}; copy the checkpoint again"
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise CheckpointError(
            f"{name} has numbers that are not finite: it was damaged, or never good; copy the "
            "checkpoint again, or make it anew"
        )
