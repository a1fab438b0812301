"""The dtype in which a model was stored, whatever it is computed in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from softtrellis.io.manifest import WEIGHTS
from softtrellis.io.tensor_files import INDEX, TensorFiles, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_IN_CONFIG = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_IN_FILES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def settings_dtype(settings: Mapping[str, Any]) -> torch.dtype | None:
    """bfloat16, float16 or float32 if config.json says so, else None."""
    for key in ("dtype", "torch_dtype"):  # the second until transformers 4.56
        name = settings.get(key)
        if isinstance(name, str) and name in _IN_CONFIG:
            return _IN_CONFIG[name]
    return None


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype in which ``from_pretrained`` loads a directory unless it is told another.

    It is that of config.json, or else of the first tensor in bfloat16, float16 or float32 in the
    safetensors files; float32 where neither says one of these.

    Raises:
        CheckpointError: config.json or a file of tensors is missing or damaged.
    """
    found = settings_dtype(read_json(directory / "config.json"))
    if found is None and any((directory / name).is_file() for name in (WEIGHTS, INDEX)):
        with TensorFiles(directory) as files:
            known = [_IN_FILES[name] for name in files.dtypes.values() if name in _IN_FILES]
            found = next(iter(known), None)
    return found or torch.float32


def remember_dtype(config: PreTrainedConfig, dtype: torch.dtype | str | None) -> None:
    """Makes a configuration say the dtype of the stored model; parameters stay as they are."""
    config.dtype = dtype
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            part.dtype = dtype
