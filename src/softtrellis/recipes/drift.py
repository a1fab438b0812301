"""The drift budget: how far latent weights travel, and how far they would have to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.latent_stacks import alike
from softtrellis.recipes.optimizer import BETAS
from softtrellis.recipes.ranks import Ranks
from softtrellis.recipes.schedules import learning_rate_at
from softtrellis.trellis.bcjr import bcjr
from softtrellis.trellis.viterbi import viterbi

SAMPLED_TILES = 256
"""Tiles per layer on which codes and entropies are measured during training."""

WALK = 0.14
"""Sigma that gradients of random sign alone may move latents by (docs/drift.md, section 9)."""

LOUD = 0.15
"""The same, from where on most runs lost."""

MOST_LR = 1.5e-2
"""The largest learning rate times steps between searches with which SmolLM2 gained steadily."""


def predicted_radius(num_states: int) -> float:
    """Radius of a code's Voronoi cell, in sigma: 1 / sqrt(2 pi S) (BCJR-QAT, section 5).

    The paper's estimate; a hypothesis, which ``measure`` lets one compare with what happens.
    """
    return 1.0 / math.sqrt(2.0 * math.pi * num_states)


LearningRateSchedule = Literal["cosine", "constant"]
Verdict = Literal["escapes", "escapes only if gradients agree", "cannot leave its basin"]


@dataclass(frozen=True)
class Budget:
    """How far AdamW can carry a weight in a run, in the units of its learning rate.

    Attributes:
        random: root mean square travel if the gradient's sign is drawn anew at every step.
        consistent: travel if the gradient never changes; the same for every weight.
        most: what no sequence of gradients exceeds.
    """

    random: float
    consistent: float
    most: float


def adam_bound(betas: tuple[float, float] = BETAS) -> float:
    """The largest step of Adam over its learning rate, for any sequence of gradients.

    By Cauchy and Schwarz on the two running means, m^2 <= v (1 - b1)^2 / (1 - b2) times the sum of
    (b1^2 / b2)^i over i >= 0; the corrections for the start only lower it. 1.165 for 0.9 and 0.95.
    """
    first, second = betas
    ratio = first * first / second
    if not ratio < 1.0:
        raise ValueError(f"Adam's steps are bounded only for betas[0]**2 < betas[1], got {betas}")
    return (1.0 - first) / math.sqrt((1.0 - second) * (1.0 - ratio))


def learning_rates(
    lr: float, steps: int, *, warmup: int = 5, schedule: LearningRateSchedule = "cosine"
) -> list[float]:
    """The learning rate of every step.

    Args:
        lr: the peak.
        steps: optimizer steps.
        warmup: steps of linear warm-up.
        schedule: "cosine" is ``learning_rate_at``, the trainer's; "constant" stays at the peak.

    Raises:
        ValueError: numbers out of range, or an unknown schedule.
    """
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be a positive number, got {lr}")
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if schedule not in get_args(LearningRateSchedule):
        raise ValueError(f"unknown schedule {schedule!r}; use 'cosine' or 'constant'")
    if schedule == "constant":
        return [lr * min(1.0, (step + 1) / (warmup + 1)) for step in range(steps)]
    shares = [step / (steps - 1) if steps > 1 else 1.0 for step in range(steps)]
    return [learning_rate_at(s, i, lr=lr, warmup=warmup) for i, s in enumerate(shares)]


def drift_budget(rates: list[float], betas: tuple[float, float] = BETAS) -> Budget:
    """What AdamW without weight decay can do with these learning rates (docs/drift.md).

    A gradient that never changes has m = g and v = g^2 once both are corrected for their start, so
    every step is lr long and the travel is the sum of lr: about lr x steps. A gradient of random
    sign has independent steps: m is a moving average with weights that sum to 1, so that the sum of
    m is the sum of the gradients but for the ends, and the travel is a random walk with the root
    mean square of the square root of the sum of lr^2: about lr x sqrt(steps).
    """
    consistent = math.fsum(rates)
    random = math.sqrt(math.fsum(rate * rate for rate in rates))
    return Budget(random, consistent, max(1.0, adam_bound(betas)) * consistent)


def rate_of_walk(
    steps: int,
    *,
    warmup: int = 5,
    schedule: LearningRateSchedule = "cosine",
    walk: float = WALK,
    viterbi_every: int = 1,
) -> float:
    """The peak learning rate with which gradients of random sign move weights by ``walk`` sigma.

    It is ``MOST_LR / viterbi_every`` at most: between two searches for hard codes gradients see the
    same code, and all weights that are near to another one go there together.

    Args:
        steps: of the run.
        warmup, schedule: see ``learning_rates``.
        walk: root mean square travel.
        viterbi_every: steps between searches.

    Raises:
        ValueError: what ``learning_rates`` raises.
    """
    rates = learning_rates(1.0, steps, warmup=warmup, schedule=schedule)
    return min(MOST_LR / viterbi_every, walk / drift_budget(rates).random)


def verdict(budget: Budget, radius: float) -> Verdict:
    """What a budget is predicted to do against a radius in the same units."""
    if budget.random >= radius:
        return "escapes"
    if budget.consistent >= radius:
        return "escapes only if gradients agree"
    return "cannot leave its basin"


@dataclass(frozen=True)
class Prediction:
    """A run's budget against the radius of a Voronoi cell.

    Attributes:
        radius: the paper's, ``predicted_radius`` times sigma_w.
        budget: of the run.
        verdict: of the budget against the paper's radius.
        measured_radius: one that was measured, see ``escape_radius``; None if none was given.
        measured_verdict: of the budget against that.
    """

    radius: float
    budget: Budget
    verdict: Verdict
    measured_radius: float | None
    measured_verdict: Verdict | None


def predict(
    num_states: int,
    lr: float,
    steps: int,
    *,
    warmup: int = 5,
    schedule: LearningRateSchedule = "cosine",
    sigma_w: float = 1.0,
    measured_radius: float | None = None,
) -> Prediction:
    """Predicts whether training changes codes, by the paper's radius and by a measured one.

    Args:
        num_states: S = 2**L.
        lr, steps, warmup, schedule: see ``learning_rates``.
        sigma_w: standard deviation of the weights in the units of ``lr``. Learning rates and
            drifts of this package are in units of it: leave it at 1.
        measured_radius: in the same units.

    Raises:
        ValueError: see ``learning_rates``.
    """
    budget = drift_budget(learning_rates(lr, steps, warmup=warmup, schedule=schedule))
    radius = sigma_w * predicted_radius(num_states)
    return Prediction(
        radius,
        budget,
        verdict(budget, radius),
        measured_radius,
        None if measured_radius is None else verdict(budget, measured_radius),
    )


@dataclass(frozen=True)
class Drift:
    """What training did to one layer so far, against its start.

    Attributes:
        drift: root mean square change of the latent weights, in sigma.
        drift_max: the largest change, in sigma.
        changed_codes: share of steps whose hard codeword differs from the start's.
        changed_tiles: share of tiles with any such step.
        entropy: mean entropy of the marginals, in nats per trellis step.
        soft_hard_gap: root mean square of soft minus hard values, in sigma.
    """

    drift: float
    drift_max: float
    changed_codes: float
    changed_tiles: float
    entropy: float
    soft_hard_gap: float


def measure(layer: LatentLinear, tiles: int = SAMPLED_TILES) -> Drift:
    """Measures a layer; codes, entropy and gap on evenly spaced ``tiles`` of its tiles."""
    return measure_all({"": layer}, tiles)[""]


@torch.no_grad()
def measure_all(layers: Mapping[str, LatentLinear], tiles: int) -> dict[str, Drift]:
    """``measure`` of layers by name, which share calls of the trellis.

    Of a layer that several ranks share this rank's own tiles count; it is left out if there are
    none.
    """
    names = {id(layer): name for name, layer in layers.items()}
    found: dict[str, Drift] = {}
    for batch in alike(layer for layer in layers.values() if len(layer.pins)):
        first, spec = batch[0], batch[0].layer.code.spec
        samples = [_sample(layer, tiles) for layer in batch]
        counts = [len(sample.latent) for sample in samples]
        latent = torch.cat([sample.latent for sample in samples])
        pins = torch.cat([sample.pins for sample in samples])
        start = torch.cat([sample.start for sample in samples])
        path = viterbi(latent, first.codebook, spec, ends=pins, backend=first.backend)
        soft = bcjr(
            latent,
            first.codebook,
            spec,
            temperature=first.temperature * first.variance,
            ends=pins,
            return_entropy=True,
            backend=first.backend,
        )
        assert soft.entropy is not None
        gap = (soft.values - path.values).square().mean((1, 2))
        parts = (
            (path.values != first.codebook[start.long()]).any(2).split(counts),
            soft.entropy.split(counts),
            gap.split(counts),
        )
        for layer, sample, differs, entropy, squared in zip(batch, samples, *parts, strict=True):
            found[names[id(layer)]] = Drift(
                drift=math.sqrt(float(sample.moved) / layer.variance),
                drift_max=float(sample.moved_most) / math.sqrt(layer.variance),
                changed_codes=float(differs.double().mean()),
                changed_tiles=float(differs.any(1).double().mean()),
                entropy=float(entropy.mean()),
                soft_hard_gap=math.sqrt(float(squared.mean()) / layer.variance),
            )
    return found


@dataclass(frozen=True, eq=False)
class _Sample:
    """Some of a layer's tiles, and what all of them did.

    Attributes:
        latent, pins, start: [n, N, V], [n] and [n, N], of the sampled tiles.
        moved: [], mean squared change of all latent weights.
        moved_most: [], the largest change.
    """

    latent: Tensor
    pins: Tensor
    start: Tensor
    moved: Tensor
    moved_most: Tensor


def _sample(layer: LatentLinear, tiles: int) -> _Sample:
    latent = layer.tiles()
    moved = latent - layer.codebook[layer.start.to(torch.int64)]
    rows = sampled_rows(layer, tiles).to(latent.device)
    pins, start = layer.pins[rows], layer.start[rows]
    return _Sample(latent[rows], pins, start, moved.square().mean(), moved.abs().max())


def sampled_rows(layer: LatentLinear, tiles: int) -> Tensor:
    """int64 [n]: this rank's own among so many evenly spaced tiles of a layer."""
    rows = evenly_spaced(layer.layer.tiles, tiles)
    if layer.share is None:
        return rows
    owned = layer.share.owned
    return rows[(rows >= owned.start) & (rows < owned.stop)].sub(owned.start)


def over_ranks(
    layers: Mapping[str, LatentLinear], measured: Mapping[str, Drift], tiles: int, ranks: Ranks
) -> dict[str, Drift]:
    """What ``measure_all`` of so many tiles gives for whole layers, from what it gave the ranks."""
    counts = {n: (len(x.pins), len(sampled_rows(x, tiles))) for n, x in layers.items()}
    parts = ranks.gather({name: (*counts[name], drift) for name, drift in measured.items()})
    found: dict[str, Drift] = {}
    for name in layers:
        own = [part[name] for part in parts if name in part]
        latent = combine([(count, drift) for count, _, drift in own])
        codes = combine([(count, drift) for _, count, drift in own if count])
        found[name] = replace(codes, drift=latent.drift, drift_max=latent.drift_max)
    return found


def combine(drifts: list[tuple[int, Drift]]) -> Drift:
    """One figure over layers given as (number of tiles, drift)."""
    total = sum(tiles for tiles, _ in drifts)

    def mean(name: str) -> float:
        return sum(tiles * float(getattr(d, name)) for tiles, d in drifts) / total

    def rms(name: str) -> float:
        return math.sqrt(sum(tiles * getattr(d, name) ** 2 for tiles, d in drifts) / total)

    return Drift(
        drift=rms("drift"),
        drift_max=max(d.drift_max for _, d in drifts),
        changed_codes=mean("changed_codes"),
        changed_tiles=mean("changed_tiles"),
        entropy=mean("entropy"),
        soft_hard_gap=rms("soft_hard_gap"),
    )


def evenly_spaced(count: int, wanted: int) -> Tensor:
    """int64 [min(count, wanted)]: numbers below ``count``, in order."""
    if count <= wanted:
        return torch.arange(count)
    return (torch.arange(wanted) * count) // wanted
