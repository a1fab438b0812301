"""What a stage of training may change, and how fast."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.learned_table import LearnedTable
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import decoder_index, decoder_layers, output_layer
from softtrellis.recipes.drift import rate_of_walk
from softtrellis.recipes.optimizer import size_of
from softtrellis.recipes.schedules import learning_rate_at

if TYPE_CHECKING:
    from softtrellis.recipes.qat import DistillConfig

UNKNOWN_STEPS = 1000
"""What a run that the clock ends is taken for until its steps are reckoned."""

LATENTS, SCALES, NORMS, TABLE = TRAINABLE = ("latents", "scales", "norms", "table")


def check_trainable(parts: Sequence[str]) -> None:
    """ValueError unless the parts are some of ``TRAINABLE``, one at least."""
    for part in parts:
        if part not in TRAINABLE:
            raise ValueError(f"train must be some of {', '.join(TRAINABLE)}, got {part!r}")
    if not parts:
        raise ValueError(f"train must name one of {', '.join(TRAINABLE)} at least")


def check_tables(
    names: Collection[str], layers: Mapping[str, QuantizedLinear | LatentLinear]
) -> None:
    """ValueError unless tables can be trained with the named layers, of all quantized ones.

    Their code has to be "hyb", and no other layer's.
    """
    codes = {layers[name].layer.code for name in names}
    for code in codes:
        if code.name != "hyb":
            raise ValueError(f"code {code.name!r} has no table to train; only 'hyb' has one")
    for name, other in layers.items():
        if name not in names and other.layer.code in codes:
            raise ValueError(
                f"a table is trained with all layers that share it, and {name} is not trained; "
                "train all quantized layers jointly, or leave the table out"
            )


def shared_tables(
    layers: Mapping[str, LatentLinear], frozen: Mapping[str, QuantizedLinear]
) -> list[LearnedTable]:
    """The tables of layers, as parameters.

    Args:
        layers: that are trained.
        frozen: the model's other ``QuantizedLinear`` layers by name.

    Raises:
        ValueError: see ``check_tables``.
    """
    check_tables(layers, {**frozen, **layers})
    by_code: dict[Any, list[LatentLinear]] = {}
    for layer in layers.values():
        by_code.setdefault(layer.layer.code, []).append(layer)
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


class LearningRates:
    """Of every parameter: latents' over the codebook's sigma, others' over their size.

    That is their root mean square, to the nearest power of two, so that few groups are stepped.

    Attributes:
        lr: peak of the latents; change it at will.
        groups: of parameters, for an optimizer.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layers: Mapping[str, LatentLinear],
        config: DistillConfig,
    ) -> None:
        """Takes ``config.lr``; "auto" is ``rate_of_walk`` of the steps, or of ``UNKNOWN_STEPS``."""
        self._warmup, self._end = config.warmup, config.lr_end
        steps = config.steps or UNKNOWN_STEPS
        auto = config.lr == "auto"
        walk = rate_of_walk(steps, warmup=config.warmup, viterbi_every=config.viterbi_every)
        self.lr = walk if auto else float(config.lr)
        found: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            layer = layers.get(name.removesuffix(".latent"))
            if layer is not None and parameter is layer.latent:
                key = math.sqrt(layer.variance), True
            else:
                rate = config.table_lr if name.startswith("table.") else config.scale_lr
                key = rate * 2.0 ** round(math.log2(size_of(parameter))), False
            found.setdefault(key, []).append(parameter)
        self.groups = [{"params": members} for members in found.values()]
        self._peaks = list(found)

    def at(self, share: float, step: int) -> list[float]:
        """Each group's at a share of the run, see ``learning_rate_at``."""
        peaks = (peak * (self.lr if latent else 1.0) for peak, latent in self._peaks)
        return [self._at(peak, share, step) for peak in peaks]

    def of_latents(self, share: float, step: int) -> float:
        """``lr`` likewise."""
        return self._at(self.lr, share, step)

    def _at(self, peak: float, share: float, step: int) -> float:
        return learning_rate_at(share, step, lr=peak, warmup=self._warmup, end=self._end)
