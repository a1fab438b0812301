"""The drift budget: how far latent weights travel, and how far they would have to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.trellis.bcjr import bcjr
from softtrellis.trellis.viterbi import viterbi

SAMPLED_TILES = 256
"""Tiles per layer on which codes and entropies are measured during training."""


def predicted_radius(num_states: int) -> float:
    """Radius of a code's Voronoi cell, in sigma: 1 / sqrt(2 pi S) (BCJR-QAT, section 5).

    The paper's estimate; a hypothesis, which ``measure`` lets one compare with what happens.
    """
    return 1.0 / math.sqrt(2.0 * math.pi * num_states)


@dataclass(frozen=True)
class Drift:
    """What training did to one layer so far, against its start.

    Attributes:
        drift: root mean square change of the latent weights, in sigma.
        drift_max: the largest change, in sigma.
        changed_codes: share of steps whose hard state differs from the start's.
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


@torch.no_grad()
def measure(layer: LatentLinear, tiles: int = SAMPLED_TILES) -> Drift:
    """Measures a layer; codes, entropy and gap on evenly spaced ``tiles`` of its tiles."""
    code, sigma = layer.layer.code, math.sqrt(layer.variance)
    latent = layer.tiles()
    start = layer.codebook[layer.start.to(torch.int64)]
    moved = (latent - start) / sigma
    chosen = _evenly_spaced(latent.shape[0], tiles).to(latent.device)
    sample, pins = latent[chosen], layer.pins[chosen]
    states = viterbi(sample, layer.codebook, code.spec, ends=pins, backend=layer.backend).states
    differs = states != layer.start[chosen]
    soft = bcjr(
        sample,
        layer.codebook,
        code.spec,
        temperature=layer.temperature * layer.variance,
        ends=pins,
        return_entropy=True,
        backend=layer.backend,
    )
    entropy = soft.entropy if soft.entropy is not None else sample.new_zeros(1)
    gap = (soft.values - layer.codebook[states.to(torch.int64)]) / sigma
    return Drift(
        drift=float(moved.square().mean().sqrt()),
        drift_max=float(moved.abs().max()),
        changed_codes=float(differs.double().mean()),
        changed_tiles=float(differs.any(1).double().mean()),
        entropy=float(entropy.mean()),
        soft_hard_gap=float(gap.square().mean().sqrt()),
    )


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


def _evenly_spaced(count: int, wanted: int) -> Tensor:
    if count <= wanted:
        return torch.arange(count)
    return (torch.arange(wanted) * count) // wanted
