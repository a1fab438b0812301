"""Models from and to the formats of other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from softtrellis.io.checkpoint import (
    base_of,
    load_full_precision,
    load_quantized,
    load_tokenizer,
    read_manifest,
    save_quantized,
)
from softtrellis.io.dense import DENSE_TYPES, DenseType, save_dense
from softtrellis.io.exl3_export import Exl3Sizes, save_exl3
from softtrellis.io.exl3_import import load_exl3, quantization_of
from softtrellis.io.files import whole_directory
from softtrellis.io.manifest import CheckpointError, is_checkpoint
from softtrellis.io.qtip import is_qtip, load_qtip
from softtrellis.io.stored_dtype import remember_dtype
from softtrellis.modules.replace import get_linear, prepare_for_layers_, quantized_layers

ExportFormat = Literal["exl3", "dense"]
LEAST_CORRELATION = 0.5
"""Of a layer with the base model's: a wrong code gives about 0, 1 bit per weight above 0.7."""

QTIP_ORDER = "tiles in the order of QTIP's kernel, which is not known here, look like that too"


@dataclass(frozen=True)
class ExportConfig:
    """How ``export_to`` writes a checkpoint.

    Attributes:
        format: "exl3" for exllamav3, or "dense" for transformers.
        dtype: of dense weights.
        partial: with "exl3", write linear layers that are not quantized as plain float16 weights.
    """

    format: ExportFormat
    dtype: DenseType = "bfloat16"
    partial: bool = False

    def __post_init__(self) -> None:
        for name, values in (("format", get_args(ExportFormat)), ("dtype", DENSE_TYPES)):
            if getattr(self, name) not in values:
                names = ", ".join(values)
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}")


def export_to(
    checkpoint: Path, config: ExportConfig, output: Path, *, force: bool = False
) -> Exl3Sizes | int:
    """Writes a checkpoint in another format.

    Returns:
        What an EXL3 model holds, or the bytes of dense tensors.

    Raises:
        OutputExists: the output exists and ``force`` is off.
        CheckpointError: not a checkpoint, or damaged.
        ValueError: the format cannot hold this model; see ``save_exl3`` and ``save_dense``.
    """
    manifest = read_manifest(checkpoint)
    with whole_directory(output, force=force) as directory:
        model, tokenizer = load_quantized(checkpoint), load_tokenizer(checkpoint)
        if config.format == "exl3":
            return save_exl3(
                model,
                tokenizer,
                directory,
                base=manifest.base,
                source_directory=checkpoint,
                provenance=manifest.provenance,
                partial=config.partial,
            )
        return save_dense(
            model,
            tokenizer,
            directory,
            dtype=config.dtype,
            base=manifest.base,
            source_directory=checkpoint,
            provenance=manifest.provenance,
        )


@dataclass(frozen=True)
class ImportReport:
    """What ``import_from`` made.

    Attributes:
        layers: quantized layers.
        decoded: layers of more than 4 bits, which are dense now, with their bits.
        correlations: of every quantized layer's weight with the base model's; empty without one.
        rounded: layers whose scales of output channels were rounded to float16.
    """

    layers: int
    decoded: Mapping[str, int]
    correlations: Mapping[str, float]
    rounded: tuple[str, ...] = ()


def import_from(
    source: Path, output: Path, *, base: str | None = None, force: bool = False
) -> ImportReport:
    """Reads a model of EXL3 or QTIP and saves it as a checkpoint with the same codes.

    Args:
        source: the model's directory.
        output: the checkpoint's.
        base: the full-precision model it was made from: every layer is compared with it, and
            training takes it as the teacher. QTIP's need it, see ``load_qtip``.
        force: replace an output that exists.

    Raises:
        OutputExists: the output exists and ``force`` is off.
        CheckpointError: another format, damaged, not supported, or not made from ``base``.
    """
    qtip = _check_format(source) == "qtip"
    if qtip and base is None:
        raise CheckpointError(
            f"{source} is a checkpoint of QTIP, whose files do not say in which order their tiles "
            "are: name the full-precision model with --base, with which each layer is compared"
        )
    with whole_directory(output, force=force) as directory:
        found = load_qtip(source) if qtip else load_exl3(source)
        record, correlations = found.base, dict[str, float]()
        if base is not None:
            full = load_full_precision(base)
            record = base_of(full)
            remember_dtype(found.model.config, full.model.config.dtype)
            try:
                correlations = correlate(found.model, full.model)
            except CheckpointError as error:
                if qtip:
                    error.add_note(QTIP_ORDER)
                raise
        save_quantized(
            found.model,
            found.tokenizer,
            directory,
            base=record,
            source_directory=source,
            provenance=found.provenance,
        )
    layers = len(quantized_layers(found.model))
    return ImportReport(layers, found.decoded, correlations, found.rounded)


def _check_format(source: Path) -> Literal["exl3", "qtip"]:
    if not source.is_dir():
        raise CheckpointError(f"{source} is no directory; download the model and give its folder")
    if is_checkpoint(source):
        raise CheckpointError(f"{source} is a softtrellis checkpoint already; use it as it is")
    if is_qtip(source):
        return "qtip"
    method = quantization_of(source).get("quant_method")
    if method != "exl3":
        what = "not quantized" if method is None else f"quantized with {method!r}"
        raise CheckpointError(
            f"{source} is {what}; models of EXL3 and QTIP can be imported, and full-precision ones "
            "are quantized with 'softtrellis quantize'"
        )
    return "exl3"


def correlate(model: nn.Module, base: nn.Module) -> dict[str, float]:
    """The correlation of every quantized layer's weight with that of the model it was made from.

    A wrong code or order leaves the size of weights right and their correlation near zero.

    Raises:
        CheckpointError: a layer that the base model lacks, or correlates less than 0.5 with.
    """
    layers = quantized_layers(model)
    prepare_for_layers_(base, layers)
    found: dict[str, float] = {}
    for name, layer in layers.items():
        try:
            expected = get_linear(base, name).weight
        except (AttributeError, ValueError) as error:
            raise CheckpointError(f"the base model has no linear layer {name}") from error
        weight = layer.weight()
        if weight.shape != expected.shape:
            raise CheckpointError(
                f"{name} is {list(weight.shape)} and in the base model {list(expected.shape)}"
            )
        pair = torch.stack([weight.double().flatten(), expected.double().flatten()])
        found[name] = float(torch.corrcoef(pair)[0, 1])
        if not found[name] >= LEAST_CORRELATION:
            raise CheckpointError(
                f"{name} correlates {found[name]:.3f} with the base model's; give the model that "
                "it was made from"
            )
    return found
