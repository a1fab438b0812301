"""What a stage of training may change, and how fast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.learned_table import LearnedTable
from softtrellis.modules.replace import decoder_index, decoder_layers, output_layer

if TYPE_CHECKING:
    from softtrellis.recipes.qat import DistillConfig

LATENTS, SCALES, NORMS, TABLE = TRAINABLE = ("latents", "scales", "norms", "table")


def check_trainable(parts: Sequence[str]) -> None:
    """ValueError unless the parts are some of ``TRAINABLE``, one at least."""
    for part in parts:
        if part not in TRAINABLE:
            raise ValueError(f"train must be some of {', '.join(TRAINABLE)}, got {part!r}")
    if not parts:
        raise ValueError(f"train must name one of {', '.join(TRAINABLE)} at least")


def shared_tables(
    layers: Mapping[str, LatentLinear], frozen: Mapping[str, Any]
) -> list[LearnedTable]:
    """The tables of layers, as parameters.

    Args:
        layers: that are trained.
        frozen: the model's other ``QuantizedLinear`` layers by name.

    Raises:
        ValueError: another code than "hyb", or one whose table frozen layers share.
    """
    by_code: dict[Any, list[LatentLinear]] = {}
    for layer in layers.values():
        by_code.setdefault(layer.layer.code, []).append(layer)
    for name, other in frozen.items():
        if other.layer.code in by_code:
            raise ValueError(
                f"a table is trained with all layers that share it, and {name} is not trained; "
                "train all quantized layers jointly, or leave the table out"
            )
    return [LearnedTable(code, members) for code, members in by_code.items()]


def norms_and_biases(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Vectors of the decoder layers that the named layers are in, except these layers' own.

    If they are in all decoder layers, also those behind the last one, but not the output layer's.
    Quantized layers have none: their biases are buffers.
    """
    prefix, layers = decoder_layers(model)
    trained = {decoder_index(model, name) for name in names}
    behind = len(trained) == len(layers)
    head = output_layer(model)
    left_out = {id(p) for p in head.parameters()} if head is not None else set()
    found: dict[str, nn.Parameter] = {}
    own = tuple(f"{name}." for name in names)
    for name, parameter in model.named_parameters():
        inside = name.startswith(f"{prefix}.")
        here = decoder_index(model, name) in trained if inside else behind
        vector = parameter.ndim == 1 and parameter.is_floating_point()
        if here and vector and not name.startswith(own) and id(parameter) not in left_out:
            found[name] = parameter
    return found


def trained_parameters(
    model: nn.Module,
    layers: Mapping[str, LatentLinear],
    tables: Iterable[LearnedTable],
    parts: Sequence[str],
) -> dict[str, nn.Parameter]:
    """The parameters of the chosen parts by name, which now require gradients.

    Args:
        model: holds ``layers``, the training layers by name.
        tables: what ``shared_tables`` gave, or none.
        parts: of ``TRAINABLE``.
    """
    found: dict[str, nn.Parameter] = {}
    if LATENTS in parts:
        found |= {f"{name}.latent": layer.latent for name, layer in layers.items()}
    if SCALES in parts:
        for name, layer in layers.items():
            scales = layer.train_scales()
            found |= {f"{name}.{key}": scale for key, scale in scales.items()}
    if NORMS in parts:
        found |= norms_and_biases(model, list(layers))
    found |= {f"table.{i}": table.table for i, table in enumerate(tables)}
    for layer in layers.values():
        layer.latent.requires_grad_(LATENTS in parts)
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def learning_rates(
    parameters: Mapping[str, nn.Parameter],
    layers: Mapping[str, LatentLinear],
    config: DistillConfig,
) -> list[float]:
    """Each parameter's own: ``lr`` times the codebook's sigma, the others times their RMS."""
    rates = []
    for name, parameter in parameters.items():
        layer = layers.get(name.removesuffix(".latent"))
        if layer is not None and parameter is layer.latent:
            rates.append(config.lr * math.sqrt(layer.variance))
            continue
        rms = float(parameter.detach().float().square().mean().sqrt())
        rate = config.table_lr if name.startswith("table.") else config.scale_lr
        rates.append(rate * (rms or 1.0))
    return rates
