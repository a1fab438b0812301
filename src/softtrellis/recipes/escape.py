"""How far latent weights must travel before their hard code changes, measured.

The hard code of a tile is the path whose codewords are nearest, among the paths with the tile's
pins. The latents that share a hard code are therefore a Voronoi cell: the points nearer to one
codeword sequence than to each of the others, an intersection of half-spaces, and convex. So along
a ray from inside the cell there is one distance at which the code changes, and no return behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softtrellis.backend import Backend
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.detours import nearest_detour
from softtrellis.trellis.viterbi import viterbi

TOLERANCE = 1e-3
"""Relative tolerance of measured radii."""

_RATIO_TOLERANCE = 1e-5


def to_unit_rms(direction: Tensor) -> Tensor:
    """[B, N, V] scaled to root mean square 1 in every tile; zero stays zero."""
    rms = direction.double().square().mean((1, 2), keepdim=True).sqrt()
    return (direction / rms.clamp_min(torch.finfo(rms.dtype).tiny)).to(direction.dtype)


def escape_radius(
    latent: Tensor,
    direction: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    pins: Tensor,
    *,
    maximum: float,
    tolerance: float = TOLERANCE,
    backend: Backend = "auto",
) -> Tensor:
    """Smallest distance along a direction at which a tile's hard code differs from the start's.

    Newton's method with Viterbi as the oracle: where the code at a distance is another path, the
    plane half-way between its codewords and the start's cuts the ray at a smaller distance, and no
    path can be missed, for the cell is convex. A tile is done when its code just inside the cut is
    still the start's: the cell's edge then lies within ``tolerance`` below the cut.

    Args:
        latent: float [B, N, V], the tiles at their start.
        direction: [B, N, V], scaled here to root mean square 1 per tile, so that the distance is
            the root mean square change of a weight.
        codebook: float [S, V].
        spec: the trellis.
        pins: int [B], the overlap at both ends of each tile.
        maximum: the largest distance that is looked at, in the tiles' units; > 0.
        tolerance: relative, of the result.
        backend: as in ``viterbi``.

    Returns:
        [B], in the tiles' units; infinity where the code is the start's up to ``maximum``, and 0
        where another path is as near as the start's.

    Raises:
        ValueError: a maximum or tolerance out of range, or tensors that do not fit.
    """
    if not maximum > 0 or not 0 < tolerance < 1:
        raise ValueError(
            f"maximum must be positive and tolerance between 0 and 1, got {maximum}, {tolerance}"
        )
    if direction.shape != latent.shape:
        raise ValueError(
            f"direction must be {list(latent.shape)} like the latent tiles, "
            f"got {list(direction.shape)}"
        )
    ray = to_unit_rms(direction)
    start = viterbi(latent, codebook, spec, ends=pins, backend=backend)
    radius = latent.new_full(latent.shape[:1], torch.inf, dtype=torch.float64)
    probe = torch.full_like(radius, maximum)
    todo = torch.arange(latent.shape[0], device=latent.device)
    while todo.numel():
        at = latent[todo] + probe[todo].to(latent.dtype)[:, None, None] * ray[todo]
        found = viterbi(at, codebook, spec, ends=pins[todo], backend=backend)
        escaped = (found.values != start.values[todo]).flatten(1).any(1)
        todo, others = todo[escaped], found.values[escaped]
        cut = _bisector(latent[todo], ray[todo], start.values[todo], others)
        radius[todo] = cut.clamp_max(probe[todo])
        probe[todo] = radius[todo] * (1.0 - tolerance)
        todo = todo[radius[todo] > 0]
    return radius.to(latent.dtype)


def _bisector(latent: Tensor, ray: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """float64 [B]: where a ray leaves the half-space nearer to one point than to another."""
    apart = (other - own).double()
    middle = 0.5 * (other + own).double() - latent.double()
    ahead = (ray.double() * apart).sum((1, 2))
    distance = (middle * apart).sum((1, 2)) / ahead
    return torch.where(ahead > 0, distance, torch.zeros_like(distance)).clamp_min(0.0)


@dataclass(frozen=True, eq=False)
class Boundary:
    """How near the boundary of a cell is to the codewords at its centre, in the codebook's units.

    Attributes:
        rms: [B], the least root mean square change that can change the code: half the distance to
            the nearest other path with the same ends, over the root of the number of weights.
        per_weight: [B], the least number such that changes of no weight by more than it can change
            the code: the least |D|_2^2 / (2 |D|_1) over the differences D to other paths.
    """

    rms: Tensor
    per_weight: Tensor


def boundary(states: Tensor, codebook: Tensor, spec: TrellisSpec) -> Boundary:
    """Exact distances from the codewords of paths to where their code can change.

    A change x of the codewords reaches the plane half-way to another path when x . D = |D|^2 / 2.
    Of all x of one length the one along D does it first, and of all x with |x_i| <= b the one with
    x_i = b sign(D_i). The best detour of a path gives the first minimum; the second is a ratio of
    sums over steps, found by Dinkelbach's method, which needs a detour for every trial value.

    Args:
        states: int [B, N], paths.
        codebook: float [S, V].
        spec: the trellis.

    Returns:
        Boundary; infinite where a path has no other with its ends.

    Raises:
        ValueError: states that are not paths.
    """
    nearest = nearest_detour(states, codebook, spec)
    distinct = nearest.length > 0
    ratio = torch.where(distinct, nearest.squared / (2.0 * nearest.length), nearest.squared)
    todo = torch.arange(states.shape[0], device=states.device)
    todo = todo[distinct & nearest.squared.isfinite()]
    while todo.numel():
        found = nearest_detour(states[todo], codebook, spec, credit=ratio[todo])
        better = found.squared / (2.0 * found.length)
        smaller = better < ratio[todo] * (1.0 - _RATIO_TOLERANCE)
        ratio[todo] = torch.minimum(better, ratio[todo])
        todo = todo[smaller]
    return Boundary(0.5 * (nearest.squared / (states.shape[1] * spec.V)).sqrt(), ratio)


def escape_share(radii: Tensor, drift: float) -> float:
    """Share of tiles whose radius is at most ``drift``: the escape curve that radii predict.

    To be compared with ``changed_tiles`` of a training log at the same drift.
    """
    return float((radii <= drift).double().mean())


def median(radii: Tensor) -> float:
    """The radius that half of the tiles do not exceed; one of the tiles'."""
    return float(radii.sort().values[(radii.numel() - 1) // 2])
