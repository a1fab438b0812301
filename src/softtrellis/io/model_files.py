"""What directories of models have in common: configuration, tokenizer, licence, all tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softtrellis.io.files import write_json
from softtrellis.io.manifest import CheckpointError
from softtrellis.io.sources import quiet
from softtrellis.io.stored_dtype import remember_dtype, settings_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says of a model, without a path or a quantization."""
    config: dict[str, Any] = json.loads(json.dumps(model.config.to_dict(), default=str))
    config["architectures"] = [type(model).__name__]
    for key in ("_name_or_path", "quantization_config"):
        config.pop(key, None)
    return config


def write_companions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    config: Mapping[str, Any] | None,
    source_directory: Path | None,
) -> None:
    """Writes config.json if it is given, the tokenizer, generation_config.json and licences."""
    if config is not None:
        write_json(directory / "config.json", dict(config))
    with quiet():
        tokenizer.save_pretrained(directory)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(directory)
    if source_directory is not None:
        for path in _licences(source_directory):
            shutil.copy2(path, directory / path.name)


def _licences(directory: Path) -> list[Path]:
    """Licence files of a model; links are followed in it and in the hub's cache only."""
    home = directory.resolve()
    places = (home, home.parent.parent / "blobs")
    return [
        path
        for path in sorted(directory.glob("LICENSE*"))
        if path.is_file() and any(path.resolve().is_relative_to(place) for place in places)
    ]


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dictionary with tied tensors once, as contiguous CPU tensors."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def empty_model(settings: Mapping[str, Any], *, device: str = "cpu") -> PreTrainedModel:
    """A causal language model of config.json's settings, in float32, its weights not set.

    On the device "meta" it takes no memory. Its configuration keeps the dtype of the settings.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    left_out = ("quantization_config", "dtype", "torch_dtype")
    dtype = settings_dtype(settings) or torch.float32
    settings = {key: value for key, value in settings.items() if key not in left_out}
    model_type = settings.pop("model_type")
    with quiet(), no_init_weights(), torch.device(device):
        config = AutoConfig.for_model(model_type, **settings)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
    remember_dtype(model.config, dtype)
    return model


def assign_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> list[str]:
    """Puts stored tensors in place; returns what the file lacks, ties aside."""
    result = model.load_state_dict(dict(tensors), strict=False, assign=True)
    if result.unexpected_keys:
        raise CheckpointError(f"the checkpoint holds an unknown tensor {result.unexpected_keys[0]}")
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return [name for name in result.missing_keys if name not in tied]


def freeze_(model: PreTrainedModel) -> None:
    """Eval mode, without gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
