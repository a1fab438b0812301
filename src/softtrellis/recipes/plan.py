"""Before a run: whether its budget can change codes at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from softtrellis.backend import Backend
from softtrellis.io.checkpoint import (
    check_base,
    load_full_precision,
    load_quantized,
    read_manifest,
)
from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.replace import (
    get_linear,
    get_quantized,
    prepare_for_layers_,
    quantized_layers,
    select_layers,
)
from softtrellis.quantizers.soft import Estimator
from softtrellis.quantizers.tiling import to_tiles
from softtrellis.recipes.drift import (
    LOUD,
    LearningRateSchedule,
    Prediction,
    drift_budget,
    evenly_spaced,
    learning_rates,
    predict,
)
from softtrellis.recipes.escape import boundary, escape_radius, median
from softtrellis.recipes.plan_text import noise_warning, warning_for
from softtrellis.recipes.seeds import check_seed
from softtrellis.trellis.bcjr import bcjr
from softtrellis.trellis.viterbi import viterbi

AMPLE = 0.5
"""Sigma of travel, if gradients agree, beyond which a run is not warned of (docs/drift.md)."""

_FEW_TILES = 16

_Measured = tuple[str, LatentLinear, Tensor, Tensor | None]
"""A layer's name, itself, which tiles are measured, and its full-precision weight."""


@dataclass(frozen=True)
class PlanConfig:
    """A run that is planned, and how it is looked at.

    Attributes:
        lr, steps, warmup, schedule: of the run, see ``learning_rates``.
        layers: the layers that it trains, see ``select_layers``; None is all quantized ones.
        tiles: tiles measured, spread evenly over the layers.
        temperature: of the soft code whose gradient is looked at, in units of sigma squared.
        maximum: the largest radius that is looked for, in sigma.
        seed: of the random directions.
        device: what measures.
        backend: of Viterbi.
    """

    lr: float = 1e-2
    steps: int = 240
    warmup: int = 5
    schedule: LearningRateSchedule = "cosine"
    layers: tuple[str, ...] | None = None
    tiles: int = 64
    temperature: float = 0.1
    maximum: float = 2.0
    seed: int = 0
    device: str = "cpu"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        learning_rates(self.lr, self.steps, warmup=self.warmup, schedule=self.schedule)
        if self.tiles < 1:
            raise ValueError(f"tiles must be at least 1, got {self.tiles}")
        for name in ("temperature", "maximum"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        check_seed(self.seed)


Radii = dict[str, Tensor]
"""By kind, float32 [tiles] on the CPU, in sigma; infinite where no boundary was found.

"nearest": root mean square change of a tile's weights below which no direction changes the code.
"per_weight": no changes of its weights by less than this, each, change the code.
The others are the root mean square change at which the code changes along a direction: "random", a
Gaussian one; "sign", random signs; "soft", the signs of the gradient that a random gradient of the
soft code leads to (the loss's is not taken), which is how Adam moves under the estimator "soft"
while gradients agree;
"teacher", straight towards the full-precision weight.
"""


@dataclass(frozen=True, eq=False)
class Plan:
    """A run's budget against the measured radii of sampled tiles.

    Attributes:
        config: what was planned.
        prediction: with the paper's radius of the largest trellis among the layers, and the median
            of the measured radii "soft".
        layers: radii by layer, for the layers of the sample.
        moved: the share of the sample's tiles whose code is no longer that of the checkpoint, from
            where latents start.
    """

    config: PlanConfig
    prediction: Prediction
    layers: Mapping[str, Radii]
    moved: float

    @property
    def radii(self) -> Radii:
        """Of all tiles of the sample."""
        kinds = next(iter(self.layers.values()))
        return {kind: torch.cat([radii[kind] for radii in self.layers.values()]) for kind in kinds}


@torch.no_grad()
def measure_radii(
    layer: LatentLinear, tiles: Tensor, config: PlanConfig, *, target: Tensor | None = None
) -> Radii:
    """The radii of some of a layer's tiles, from where its latents are.

    "nearest" and "per_weight" hold whatever the direction. They are exact for latents at the
    codewords, where training starts, and lowered by the distance from there for others.

    Args:
        layer: the layer.
        tiles: int64 [n], which tiles.
        config: its ``temperature``, ``maximum``, ``seed`` and ``backend`` count.
        target: [out_features, in_features], the full-precision weight.
    """
    code, codebook, sigma = layer.layer.code, layer.codebook, layer.variance**0.5
    chosen = tiles.to(layer.latent.device)
    latent, pins = layer.tiles()[chosen], layer.pins[chosen]
    path = viterbi(latent, codebook, code.spec, ends=pins, backend=config.backend)
    off = (latent - path.values).abs()
    bounds = boundary(path.states, codebook, code.spec)
    found = {
        "nearest": (bounds.rms - off.square().mean((1, 2)).sqrt()).clamp_min(0.0),
        "per_weight": (bounds.per_weight - off.amax((1, 2))).clamp_min(0.0),
    }
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    rays = {
        "random": noise,
        "sign": noise.sign(),
        "soft": _through_soft_code(layer, chosen, noise, config),
    }
    if target is not None:
        wanted = layer.basis.to_latent(target.to(latent))
        rays["teacher"] = to_tiles(wanted, code.spec, code.order)[chosen] - latent
    for kind, direction in rays.items():
        found[kind] = escape_radius(
            latent,
            direction,
            codebook,
            code.spec,
            pins,
            maximum=config.maximum * sigma,
            backend=config.backend,
        )
    return {kind: (radius / sigma).cpu() for kind, radius in found.items()}


def _through_soft_code(
    layer: LatentLinear, tiles: Tensor, upstream: Tensor, config: PlanConfig
) -> Tensor:
    """[n, N, V], signs of the tiles' gradient for the soft code's gradient ``upstream``."""
    latent = layer.tiles()[tiles].detach().requires_grad_()
    with torch.enable_grad():
        soft = bcjr(
            latent,
            layer.codebook,
            layer.layer.code.spec,
            temperature=config.temperature * layer.variance,
            ends=layer.pins[tiles],
            backend=config.backend,
        )
        (gradient,) = torch.autograd.grad(soft.values, latent, upstream)
    return gradient.sign()


def _moved(layer: LatentLinear, tiles: Tensor, backend: Backend) -> Tensor:
    """bool [n] on the CPU: whether the tiles' codewords are others than those of ``start``."""
    chosen = tiles.to(layer.latent.device)
    path = viterbi(
        layer.tiles()[chosen],
        layer.codebook,
        layer.layer.code.spec,
        ends=layer.pins[chosen],
        backend=backend,
    )
    return (path.values != layer.codebook[layer.start[chosen].long()]).flatten(1).any(1).cpu()


def plan_layers(
    layers: Mapping[str, LatentLinear],
    config: PlanConfig,
    *,
    targets: Mapping[str, Tensor] | None = None,
) -> Plan:
    """The plan of training these layers; for the start of a run, see ``warning_for``.

    Args:
        layers: by name, as they are at the start; ``config.layers`` and ``device`` do not count.
        config: the run, and how many tiles are measured.
        targets: full-precision weights by name.
    """
    sample = sample_tiles({name: len(layer.start) for name, layer in layers.items()}, config)
    return _plan(
        ((name, layers[name], tiles, (targets or {}).get(name)) for name, tiles in sample.items()),
        config,
    )


def plan_checkpoint(checkpoint: Path, config: PlanConfig, *, teacher: str | None = None) -> Plan:
    """The plan of training a checkpoint.

    Args:
        checkpoint: its directory.
        config: the run, and how it is looked at.
        teacher: the full-precision model, for the direction towards its weights.

    Raises:
        UnknownLayerError: a pattern that names no layer.
        ValueError: a layer that is not quantized.
        CheckpointError: a damaged checkpoint, or one that was made from another model.
    """
    manifest, model = read_manifest(checkpoint), load_quantized(checkpoint)
    names = list(quantized_layers(model))
    if config.layers is not None:
        names = select_layers(model, config.layers)
    modules = {name: get_quantized(model, name) for name in names}
    weights: dict[str, Tensor] = {}
    if teacher is not None:
        dense = load_full_precision(teacher).model
        check_base(manifest, dense)
        prepare_for_layers_(dense, names)
        weights = {name: get_linear(dense, name).weight.detach() for name in names}
    sample = sample_tiles({name: module.layer.tiles for name, module in modules.items()}, config)

    def layers() -> Iterator[_Measured]:
        for name, tiles in sample.items():
            latent = LatentLinear.from_quantized(modules[name].to(torch.device(config.device)))
            yield name, latent, tiles, weights.get(name)

    return _plan(layers(), config)


def sample_tiles(counts: Mapping[str, int], config: PlanConfig) -> dict[str, Tensor]:
    """int64 numbers of random tiles by layer, as evenly as possible; the same for the same seed.

    With fewer tiles than layers, evenly spaced layers have one each.
    """
    names = list(counts)
    chosen = [names[i] for i in evenly_spaced(len(names), config.tiles).tolist()]
    each, more = divmod(config.tiles, len(chosen))
    generator = torch.Generator().manual_seed(config.seed)
    return {
        name: torch.randperm(counts[name], generator=generator)[: each + (i < more)].sort().values
        for i, name in enumerate(chosen)
    }


def _plan(layers: Iterable[_Measured], config: PlanConfig) -> Plan:
    found: dict[str, Radii] = {}
    moved: list[Tensor] = []
    states = 0
    for name, layer, tiles, target in layers:
        found[name] = measure_radii(layer, tiles, config, target=target)
        moved.append(_moved(layer, tiles, config.backend))
        states = max(states, layer.layer.code.spec.num_states)
    soft = torch.cat([radii["soft"] for radii in found.values()])
    prediction = predict(
        states,
        config.lr,
        config.steps,
        warmup=config.warmup,
        schedule=config.schedule,
        measured_radius=median(soft),
    )
    return Plan(config, prediction, found, float(torch.cat(moved).double().mean()))


def run_warning(
    layers: Mapping[str, LatentLinear],
    *,
    estimator: Estimator,
    lr: float,
    steps: int,
    warmup: int,
    temperature: float,
    backend: Backend = "auto",
) -> str | None:
    """What is to be said of a run that is about to start; measures a few tiles if it may be needed.

    ``warning_for`` a short run; and ``noise_warning`` where the estimator is the identity, whose
    gradients point nowhere near a boundary by themselves.
    """
    budget = drift_budget(learning_rates(lr, steps, warmup=warmup))
    noisy = estimator == "identity" and budget.random > LOUD
    if budget.consistent > AMPLE and not noisy:
        return None
    config = PlanConfig(
        lr, steps, warmup, tiles=_FEW_TILES, temperature=temperature, backend=backend
    )
    plan = plan_layers(layers, config)
    return warning_for(plan) or (noise_warning(plan) if noisy else None)
