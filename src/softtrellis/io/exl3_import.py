"""Reading EXL3 models that exllamav3 or ``save_exl3`` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softtrellis.io.exl3 import FORMAT, MAX_CODE_BITS, TENSORS, Exl3Layer
from softtrellis.io.exl3_export import RECORD
from softtrellis.io.foreign import (
    Imported,
    Plan,
    dense_tensors,
    fill_model,
    foreign_tokenizer,
    planned_model,
)
from softtrellis.io.manifest import BaseModel, CheckpointError
from softtrellis.io.sources import card_licence, fingerprint
from softtrellis.io.tensor_files import TensorFiles, read_json
from softtrellis.modules.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    method = quantization_of(directory).get("quant_method")
    if method != FORMAT:
        raise CheckpointError(
            f"{directory} is not an EXL3 model: its config.json says quant_method {method!r}"
        )
    with TensorFiles(directory) as files:
        model, plan = planned_model(directory, files, TENSORS)
        decoded = _fill(model, plan, files)
    tokenizer = foreign_tokenizer(directory)
    base, provenance = _record(directory, model)
    return Imported(model, tokenizer, base, provenance, decoded)


def _fill(model: PreTrainedModel, plan: Plan, files: TensorFiles) -> dict[str, int]:
    """Puts everything in place; bits of the layers that are dense now."""
    tensors = dense_tensors(plan, files)
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
    fill_model(model, modules, tensors)
    return decoded


def _has_bias(model: nn.Module, name: str) -> bool:
    return getattr(model.get_submodule(name), "bias", None) is not None


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
