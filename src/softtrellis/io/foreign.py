"""What reading the quantized models of other programs has in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softtrellis.io.checkpoint import load_tokenizer
from softtrellis.io.claims import check_buffers, check_layer_count
from softtrellis.io.errors import first_line
from softtrellis.io.manifest import BaseModel, CheckpointError
from softtrellis.io.model_files import assign_tensors, empty_model, freeze_
from softtrellis.io.tensor_files import TensorFiles, read_json
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import head_name, prepare_for_layers_, replace_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MARK = ".trellis"
QTIP_SETTINGS = "quip_params"
_NOT_SETTINGS = ("quantization_config", QTIP_SETTINGS, "auto_map", "architectures")


@dataclass(frozen=True)
class Imported:
    """A model that was read from another format.

    Attributes:
        model: with ``QuantizedLinear`` layers, float32 elsewhere, in eval mode; its configuration
            keeps the dtype of config.json.
        tokenizer: with its chat template, if there is one.
        base: the model it was made from, as far as the files say: its name is otherwise that of
            the directory, and its fingerprint that of the tensors as they are stored.
        provenance: settings and figures that the files keep.
        decoded: layers of more than 4 bits, which are dense now, with their bits.
        rounded: layers whose scales of output channels were rounded to float16.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: BaseModel
    provenance: Mapping[str, Any]
    decoded: Mapping[str, int]
    rounded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Which tensor goes where, made without reading one.

    Attributes:
        layers: (in_features, out_features) of the quantized layers.
        dense: names of the tensors that are taken as they are.
        untied: whether the output layer is quantized and no longer the embedding.
    """

    layers: dict[str, tuple[int, int]]
    dense: list[str]
    untied: bool

    @classmethod
    def of(
        cls,
        skeleton: PreTrainedModel,
        names: Iterable[str],
        files: TensorFiles,
        keys: tuple[str, ...],
    ) -> Plan:
        """Compares the files with a model without weights."""
        names = list(names)
        prepare_for_layers_(skeleton, names)
        modules = dict(skeleton.named_modules())
        layers: dict[str, tuple[int, int]] = {}
        for name in names:
            module = modules.get(name)
            if not isinstance(module, nn.Linear):
                raise CheckpointError(
                    f"{name} is no linear layer of a {type(skeleton).__name__} here; mixtures of "
                    "experts and models with merged layers cannot be imported"
                )
            layers[name] = module.in_features, module.out_features
        tied = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
        untied = bool(tied) and head_name(skeleton) in layers
        expected = {
            key: tuple(tensor.shape)
            for key, tensor in skeleton.state_dict().items()
            if key.rpartition(".")[0] not in layers
        }
        ours = {f"{name}.{key}" for name in layers for key in keys}
        dense = [name for name in files.shapes if name not in ours]
        for name in dense:
            if name not in expected:
                raise CheckpointError(f"{name} is no tensor of a {type(skeleton).__name__} here")
            if files.shapes[name] != expected[name]:
                raise CheckpointError(
                    f"{name} has shape {list(files.shapes[name])} and must have "
                    f"{list(expected[name])}; the files do not fit config.json"
                )
        missing = sorted(expected.keys() - set(dense) - tied)
        if missing:
            raise CheckpointError(f"the files lack {missing[0]}; copy the model again")
        check_buffers(skeleton)
        return cls(layers, dense, untied)


def planned_model(
    directory: Path, files: TensorFiles, keys: tuple[str, ...]
) -> tuple[PreTrainedModel, Plan]:
    """The model of config.json, with its layers still dense, and where the tensors go.

    Args:
        directory: the model's.
        files: its tensors.
        keys: the names that tensors of a quantized layer can have.

    Raises:
        CheckpointError: the files do not fit config.json, or the architecture is not supported.
    """
    names = [name.removesuffix(MARK) for name in files.shapes if name.endswith(MARK)]
    if not names:
        raise CheckpointError(f"{directory} has no tensor that ends in {MARK}")
    settings = _settings(read_json(directory / "config.json"), files)
    try:
        plan = Plan.of(empty_model(settings, device="meta"), names, files, keys)
        if plan.untied:
            settings["tie_word_embeddings"] = False
        model = empty_model(settings)
    except CheckpointError:
        raise
    except Exception as error:  # what transformers makes of a strange configuration
        raise CheckpointError(
            f"{directory / 'config.json'} cannot be used ({type(error).__name__}: "
            f"{first_line(error)}); copy the model again"
        ) from error
    prepare_for_layers_(model, plan.layers)
    return model, plan


def fill_model(
    model: PreTrainedModel, modules: Mapping[str, QuantizedLinear], tensors: Mapping[str, Tensor]
) -> None:
    """Puts the quantized layers and all other tensors into a model, in place, and freezes it.

    Raises:
        CheckpointError: a tensor is missing, or does not fit.
    """
    replace_modules(model, modules, lambda name, _: modules[name])
    stored = {
        f"{name}.{key}": buffer
        for name, module in modules.items()
        for key, buffer in module.state_dict().items()
    }
    try:
        missing = assign_tensors(model, {**tensors, **stored})
    except (AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the tensors do not fit the model: {first_line(error)}") from error
    if missing:
        raise CheckpointError(f"the files lack {missing[0]}; copy the model again")
    freeze_(model)


def dense_tensors(plan: Plan, files: TensorFiles) -> dict[str, Tensor]:
    """The tensors that belong to no quantized layer, in float32.

    Raises:
        CheckpointError: a type of fewer than 16 bits, or values that are not finite.
    """
    return {name: _plain(name, files.get(name)) for name in plan.dense}


def check_tensor(
    name: str, key: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """CheckpointError unless a layer's tensor has this type and shape, and finite values."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name}.{key} is {tensor.dtype} {list(tensor.shape)} and must be {dtype} "
            f"{list(shape)}; the layer does not fit the model in config.json"
        )
    if dtype.is_floating_point and not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{name}.{key} has a value that is not finite")


def signs_of(scale: Tensor) -> Tensor:
    """int8 of +-1: the signs of floating-point numbers, zeros included."""
    return 1 - 2 * torch.signbit(scale).to(torch.int8)


def foreign_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """``load_tokenizer``, with a CheckpointError for templates that would be saved elsewhere."""
    tokenizer = load_tokenizer(directory)
    templates: object = getattr(tokenizer, "chat_template", None)
    for name in templates if isinstance(templates, dict) else ():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"the tokenizer in {directory} has a chat template named {name!r}, and templates "
                "are saved under their names; do not use this model"
            )
    return tokenizer


def _settings(config: Mapping[str, Any], files: TensorFiles) -> dict[str, Any]:
    """What of config.json describes the model; nothing that chooses code to run."""
    settings = {
        key: value
        for key, value in config.items()
        if key not in _NOT_SETTINGS and not key.startswith("_") and "implementation" not in key
    }
    if isinstance(settings.get("rope_parameters"), dict):
        for key in ("rope_theta", "rope_scaling"):  # the same, for programs that do not know it
            settings.pop(key, None)
    check_layer_count(settings, len(files.shapes))
    return settings


def _plain(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if tensor.itemsize < 2 or not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"{name} is {tensor.dtype} or holds values that are not finite; it must be finite "
            "float16, bfloat16 or float32"
        )
    return tensor.to(torch.float32)
