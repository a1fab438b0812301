"""Reading EXL3 models that exllamav3 or ``save_exl3`` wrote."""

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
from softtrellis.io.exl3 import FORMAT, MAX_CODE_BITS, TENSORS, Exl3Layer
from softtrellis.io.exl3_export import RECORD
from softtrellis.io.manifest import BaseModel, CheckpointError
from softtrellis.io.model_files import assign_tensors, empty_model, freeze_
from softtrellis.io.sources import card_licence, fingerprint
from softtrellis.io.tensor_files import TensorFiles, read_json
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import head_name, prepare_for_layers_, replace_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MARK = ".trellis"
_NOT_SETTINGS = ("quantization_config", "auto_map", "architectures", "torch_dtype", "dtype")


@dataclass(frozen=True)
class Imported:
    """A model that was read from another format.

    Attributes:
        model: with ``QuantizedLinear`` layers, float32 elsewhere, in eval mode.
        tokenizer: with its chat template, if there is one.
        base: the model it was made from, as far as the files say: its name is otherwise that of
            the directory, and its fingerprint that of the tensors as they are stored.
        provenance: settings and figures that the files keep.
        decoded: layers of more than 4 bits, which are dense now, with their bits.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: BaseModel
    provenance: Mapping[str, Any]
    decoded: Mapping[str, int]


def quantization_of(directory: Path) -> Mapping[str, Any]:
    """``quantization_config`` of a model's config.json; empty if it has none.

    Raises:
        CheckpointError: no readable config.json.
    """
    value = read_json(directory / "config.json").get("quantization_config")
    return value if isinstance(value, dict) else {}


def load_exl3(directory: Path) -> Imported:
    """Reads an EXL3 model, bit for bit in its quantized layers.

    Layers of more than 4 bits, an output layer of 6 for instance, become dense: a code here has
    at most 4. Nothing outside the directory is read, and nothing is written.

    Args:
        directory: with config.json, a tokenizer, and safetensors files.

    Raises:
        CheckpointError: not EXL3, damaged, or of an architecture whose tensors have other names
            here, such as mixtures of experts.
    """
    settings = read_json(directory / "config.json")
    method = quantization_of(directory).get("quant_method")
    if method != FORMAT:
        raise CheckpointError(
            f"{directory} is not an EXL3 model: its config.json says quant_method {method!r}"
        )
    with TensorFiles(directory) as files:
        names = [name.removesuffix(MARK) for name in files.shapes if name.endswith(MARK)]
        if not names:
            raise CheckpointError(f"{directory} has no tensor that ends in {MARK}")
        clean = _settings(settings, files)
        try:
            plan = _Plan.of(empty_model(clean, device="meta"), names, files)
            if plan.untied:
                clean["tie_word_embeddings"] = False
            model = empty_model(clean)
        except CheckpointError:
            raise
        except Exception as error:  # what transformers makes of a strange configuration
            raise CheckpointError(
                f"{directory / 'config.json'} cannot be used ({type(error).__name__}: "
                f"{first_line(error)}); copy the model again"
            ) from error
        decoded = _fill(model, plan, files)
    freeze_(model)
    tokenizer = _tokenizer(directory)
    base, provenance = _record(directory, model)
    return Imported(model, tokenizer, base, provenance, decoded)


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
    return settings | {"dtype": "float32"}


@dataclass(frozen=True)
class _Plan:
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
    def of(cls, skeleton: PreTrainedModel, names: Iterable[str], files: TensorFiles) -> _Plan:
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
        ours = {f"{name}.{key}" for name in layers for key in TENSORS}
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


def _fill(model: PreTrainedModel, plan: _Plan, files: TensorFiles) -> dict[str, int]:
    """Puts everything in place; bits of the layers that are dense now."""
    prepare_for_layers_(model, plan.layers)
    tensors = {name: _plain(name, files.get(name)) for name in plan.dense}
    codebooks: dict[Any, Tensor] = {}
    modules: dict[str, QuantizedLinear] = {}
    decoded: dict[str, int] = {}
    for name, size in plan.layers.items():
        stored = {
            key: files.get(f"{name}.{key}") for key in TENSORS if f"{name}.{key}" in files.shapes
        }
        layer = Exl3Layer.of(name, stored, *size)
        if layer.bits > MAX_CODE_BITS:
            decoded[name] = layer.bits
            tensors[f"{name}.weight"] = layer.weight()
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias.to(torch.float32)
            continue
        code = layer.layer.code
        if code not in codebooks:
            codebooks[code] = code.codebook()
        modules[name] = layer.to_module(codebooks[code])
        if modules[name].layer.bias != _has_bias(model, name):
            raise CheckpointError(f"{name} must have a bias exactly if config.json says so")
    if not modules:
        raise CheckpointError(
            f"all quantized layers have more than {MAX_CODE_BITS} bits, and codes here have at "
            f"most {MAX_CODE_BITS}; take the full-precision model instead"
        )
    replace_modules(model, modules, lambda name, _: modules[name])
    stored_of = {
        f"{name}.{key}": buffer
        for name, module in modules.items()
        for key, buffer in module.state_dict().items()
    }
    try:
        missing = assign_tensors(model, tensors | stored_of)
    except (AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the tensors do not fit the model: {first_line(error)}") from error
    if missing:
        raise CheckpointError(f"the files lack {missing[0]}; copy the model again")
    return decoded


def _has_bias(model: nn.Module, name: str) -> bool:
    return getattr(model.get_submodule(name), "bias", None) is not None


def _plain(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if tensor.itemsize < 2 or not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"{name} is {tensor.dtype} or holds values that are not finite; it must be finite "
            "float16, bfloat16 or float32"
        )
    return tensor.to(torch.float32)


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(directory)
    templates: object = getattr(tokenizer, "chat_template", None)
    for name in templates if isinstance(templates, dict) else ():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"the tokenizer in {directory} has a chat template named {name!r}, and templates "
                "are saved under their names; do not use this model"
            )
    return tokenizer


def _record(directory: Path, model: PreTrainedModel) -> tuple[BaseModel, dict[str, Any]]:
    """The base model and the provenance, from the record of ``save_exl3`` where there is one."""
    path = directory / RECORD
    if path.is_file():
        value = read_json(path)
        try:
            base = BaseModel(**value["base"])
            texts = (base.name, base.fingerprint, base.licence)
            if not all(isinstance(text, str) and text.isprintable() for text in texts):
                raise ValueError("name, fingerprint and licence must be lines of text")
            return base, dict(value["provenance"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it or copy it") from error
    base = BaseModel(directory.resolve().name, fingerprint(model), card_licence(directory))
    return base, {"import": dict(quantization_of(directory))}
