"""Writing models as EXL3, for exllamav3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softtrellis import __version__
from softtrellis.io.exl3 import FORMAT, MULTIPLIERS, exl3_obstacle, exl3_tensors, to_half
from softtrellis.io.files import write_json
from softtrellis.io.manifest import WEIGHTS, BaseModel
from softtrellis.io.model_card import export_card
from softtrellis.io.model_files import config_of, stored_tensors, write_companions
from softtrellis.modules.experts import UnfusedExperts, expert_layout
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import linear_names, quantized_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "softtrellis_export.json"
"""Where an export says what it was made from; other programs need not read it."""

DENSE_BITS = 16


@dataclass(frozen=True)
class Exl3Sizes:
    """What an export holds.

    Attributes:
        layers: quantized layers.
        weights: of these, without padding.
        trellis_bits: stored per such weight; more than K only by padding.
        padded_layers: how many of the layers have a dimension that is no multiple of 128.
        unquantized: names of linear layers written as plain float16 weights.
    """

    layers: int
    weights: int
    trellis_bits: float
    padded_layers: int
    unquantized: tuple[str, ...]


def save_exl3(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    base: BaseModel,
    source_directory: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> Exl3Sizes:
    """Writes a model as EXL3; see docs/export.md.

    The trellis, the signs and the scales are the model's bits. All other tensors are rounded to
    float16.

    Args:
        model: with quantized layers of profile "exl3".
        tokenizer: saved with its chat template.
        directory: an existing, writable directory; see ``whole_directory``.
        base: the model it was made from, kept in a record beside the weights.
        source_directory: where licence files are copied from.
        provenance: settings and figures to keep in that record.
        partial: write linear layers of the decoder layers that are not quantized as plain float16
            weights; without it they are refused.

    Raises:
        ValueError: a layer that EXL3 cannot hold, layers that are not quantized, mixtures of
            experts, or a value outside float16's range; the message names what to do.
    """
    from safetensors.torch import save_file

    layers = quantized_layers(model)
    unquantized = _check(model, layers, partial=partial)
    tensors = _dense_tensors(model, layers)
    storage: dict[str, Any] = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        storage.setdefault(module, {"stored_tensors": {}})["stored_tensors"][name] = _record(tensor)
    for name, layer in layers.items():
        try:
            found = exl3_tensors(layer)
        except ValueError as error:
            raise ValueError(f"{name} cannot be written as EXL3: {error}") from error
        named = {f"{name}.{key}": tensor for key, tensor in found.items()}
        tensors |= named
        storage[name] = _layer_storage(layer, named)
    save_file(tensors, str(directory / WEIGHTS), metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)
    summary = _quantization_config(model, layers, provenance or {})
    write_companions(
        model,
        tokenizer,
        directory,
        config=_config(model) | {"quantization_config": summary},
        source_directory=source_directory,
    )
    full = summary | {"tensor_storage": storage}
    write_json(directory / "quantization_config.json", full)
    record = {"format": FORMAT, "base": asdict(base), "provenance": dict(provenance or {})}
    write_json(directory / RECORD, record)
    card = export_card(base.name, base.licence, "EXL3, for exllamav3", provenance or {})
    (directory / "README.md").write_text(card, encoding="utf-8")
    return _sizes(layers, unquantized)


def _check(
    model: PreTrainedModel, layers: Mapping[str, QuantizedLinear], *, partial: bool
) -> tuple[str, ...]:
    """The linear layers to be written dense; ValueError for what EXL3 cannot hold."""
    for name, layer in layers.items():
        obstacle = exl3_obstacle(layer.layer)
        if obstacle is not None:
            raise ValueError(
                f"{name} cannot be written as EXL3: {obstacle}, or export it with --format dense"
            )
    for name, module in model.named_modules():
        if isinstance(module, UnfusedExperts) or expert_layout(module) is not None:
            raise ValueError(
                f"{name} is a mixture of experts, and how EXL3 names experts is not known; export "
                "the model with --format dense"
            )
    unquantized = tuple(name for name in linear_names(model) if name not in layers)
    if unquantized and not partial:
        raise ValueError(
            f"{len(unquantized)} linear layers are not quantized, {unquantized[0]} for one; "
            "quantize all of them, or write these as plain float16 weights with --partial"
        )
    return unquantized


def _dense_tensors(
    model: PreTrainedModel, layers: Mapping[str, QuantizedLinear]
) -> dict[str, Tensor]:
    """All tensors that are not of quantized layers, in float16."""
    dense: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(model).items():
        if name.rpartition(".")[0] in layers:
            continue
        try:
            dense[name] = to_half(tensor) if tensor.is_floating_point() else tensor
        except ValueError as error:
            raise ValueError(f"{name} cannot be written as EXL3: {error}") from error
    return dense


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """config.json with the keys that programs read which do not know transformers 5."""
    config = config_of(model) | {"dtype": "float16", "torch_dtype": "float16"}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        if scaling.get("rope_type", "default") != "default":
            config["rope_scaling"] = scaling
    return config


def _quantization_config(
    model: PreTrainedModel, layers: Mapping[str, QuantizedLinear], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    output: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head = next((name for name, layer in layers.items() if layer is output), None)
    body = [layer for name, layer in layers.items() if name != head] or list(layers.values())
    weights = sum(layer.in_features * layer.out_features for layer in body)
    bits = sum(layer.in_features * layer.out_features * _bits(layer) for layer in body) / weights
    settings = provenance.get("quantize", {})
    return {
        "quant_method": FORMAT,
        "version": __version__,
        "bits": int(bits) if bits == int(bits) else round(bits, 2),
        "head_bits": DENSE_BITS if head is None else _bits(layers[head]),
        "calibration": {"rows": settings.get("windows", 0), "cols": settings.get("ctx", 0)},
        "out_scales": "always",
        "codebook": body[0].layer.code.name,
    }


def _layer_storage(layer: QuantizedLinear, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    storage: dict[str, Any] = {
        "stored_tensors": {name: _record(tensor) for name, tensor in tensors.items()},
        "quant_format": FORMAT,
        "bits_per_weight": _bits(layer),
    }
    code = layer.layer.code.name
    if code in MULTIPLIERS:
        storage[f"{code}_multiplier"] = MULTIPLIERS[code]
    return storage


def _record(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "n_bytes": tensor.numel() * tensor.element_size(),
        "dtype": str(tensor.dtype),
    }


def _bits(layer: QuantizedLinear) -> int:
    return layer.layer.code.spec.k


def _sizes(layers: Mapping[str, QuantizedLinear], unquantized: tuple[str, ...]) -> Exl3Sizes:
    formats = [layer.layer for layer in layers.values()]
    weights = sum(layer.in_features * layer.out_features for layer in formats)
    stored = sum(layer.codes.numel() * torch.iinfo(torch.int16).bits for layer in layers.values())
    padded = sum(layer.padded != (layer.out_features, layer.in_features) for layer in formats)
    return Exl3Sizes(len(formats), weights, stored / weights, padded, unquantized)
