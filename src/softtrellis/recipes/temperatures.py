"""The temperatures that a run starts and ends with, for the layers that it trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import get_linear, get_quantized
from softtrellis.recipes.ranks import whole_weight
from softtrellis.trellis.bcjr import FLOAT32_TEMPERATURES

if TYPE_CHECKING:
    from softtrellis.recipes.qat import DistillConfig


def initial_temperature(
    config: DistillConfig, teacher: nn.Module, student: nn.Module, names: Sequence[str]
) -> float:
    """``t_init``, or twice the mean squared quantization error over the weights' variance."""
    if config.t_init != "auto":
        return float(config.t_init)
    error = energy = 0.0
    for name in names:
        weight = whole_weight(get_linear(teacher, name))
        found = get_quantized(student, name).weight()
        error += float((found - weight).double().square().sum())
        energy += float(weight.double().square().sum())
    return max(2.0 * error / energy, config.t_min)


def check_temperatures(layers: Iterable[QuantizedLinear], t_init: float, t_min: float) -> None:
    """ValueError where a code's variance takes a temperature out of what BCJR can do."""
    low, high = FLOAT32_TEMPERATURES
    for layer in layers:
        variance = layer.layer.code.sigma(layer.codebook) ** 2
        if t_min * variance < low * (1 - 1e-6) or t_init * variance > high:
            raise ValueError(
                f"temperatures of this code must lie between {low / variance:.3g} and "
                f"{high / variance:.3g}, got t_init={t_init:.3g}, t_min={t_min:.3g}"
            )
