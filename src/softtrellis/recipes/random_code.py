"""What a trellis with a random Gaussian code leads one to expect of escape radii.

A path's neighbours are the paths that leave it once and come back. With independent N(0, 1) values
in every state, a neighbour that differs in m steps lies at the squared distance 2 chi^2 with m V
degrees of freedom. Escape along a random direction is then the event that a channel code fails in
white noise, and the random coding union bound (Polyanskiy, Poor and Verdu, 2010) estimates it.
docs/drift.md has the derivation and how well it fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from softtrellis.spec import TILE_WEIGHTS, TrellisSpec

_SAMPLES = 64
_BISECTIONS = 20
_CERTAIN = 20.0  # so many expected neighbours, or as their logarithm, leave no doubt
_NEGLIGIBLE = 1e-4


@lru_cache(maxsize=64)
def detours(spec: TrellisSpec, steps: int) -> tuple[int, ...]:
    """How many paths leave a given one at a given step and first meet it again m steps later.

    The exclusive or of two paths is a path, so these are the paths from overlap 0 that first
    return to it after m steps, for m = 1 to ``steps``. All paths from 0 to 0 of m steps number
    2**(m kV) / U, or 1 where that is less; the first returns follow from their renewal equation.
    """
    free = spec.L - spec.shift
    returns = [1, *(2 ** max(0, m * spec.shift - free) for m in range(1, steps + 1))]
    first: list[int] = []
    for m in range(1, steps + 1):
        later = sum(count * returns[m - j] for j, count in enumerate(first, start=1))
        first.append(returns[m] - later)
    first[0] -= 1  # the given path itself
    return tuple(first)


def shortest_detour(spec: TrellisSpec) -> int:
    """Fewest steps in which two paths with the same ends differ: floor(L / kV)."""
    return spec.L // spec.shift


def cutoff_drift(k: int) -> float:
    """1 / sqrt(2 (4**k - 1)) sigma: where the union bound averaged over directions diverges."""
    return 1.0 / math.sqrt(2.0 * (4.0**k - 1.0))


def capacity_drift(k: int) -> float:
    """1 / sqrt(4**k - 1) sigma: no code of k bits per weight holds a random drift beyond it.

    Where Shannon's capacity of the Gaussian channel, log2(1 + 1 / t^2) / 2, falls to k bits.
    """
    return 1.0 / math.sqrt(4.0**k - 1.0)


def expected_escape(spec: TrellisSpec, drift: float, *, n: int = TILE_WEIGHTS) -> float:
    """Expected share of tiles that escape along a random direction within a drift.

    For sampled codewords c and directions z of root mean square 1, a detour of m steps that starts
    at a given step is nearer to x = c + t z than c is with the probability that a noncentral chi^2
    variable of m V degrees of freedom and noncentrality |x|^2 is below t^2 |z|^2, both summed over
    these steps. The share is the mean of 1 - exp(-sum over steps and m of A_m times that), with A_m
    ``detours``.

    Args:
        spec: the trellis.
        drift: root mean square change t of a tile's weights, in sigma.
        n: weights of a tile.
    """
    if drift <= 0.0:
        return 0.0
    steps = spec.steps(n)
    generator = torch.Generator().manual_seed(0)
    shape = (2, _SAMPLES, steps, spec.V)
    c, z = torch.randn(shape, generator=generator, dtype=torch.float64).unbind()
    z = drift * z / z.square().mean((1, 2), keepdim=True).sqrt()
    received = _sums((c + z).square().sum(2))
    noise = _sums(z.square().sum(2))
    expected = torch.zeros(_SAMPLES, dtype=torch.float64)
    for m, count in enumerate(detours(spec, steps), start=1):
        if count:
            chance = log_chance_nearer(
                m * spec.V, received[:, m:] - received[:, :-m], noise[:, m:] - noise[:, :-m]
            )
            more = (chance + math.log(count)).clamp_max(_CERTAIN).exp().sum(1)
            expected += more
            if bool(((more < _NEGLIGIBLE * expected) | (expected > _CERTAIN)).all()):
                break  # longer detours are more, but further away by more
    return float((1.0 - torch.exp(-expected)).mean())


def _sums(x: Tensor) -> Tensor:
    """[B, N + 1], sums of the entries before each step."""
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))


def log_chance_nearer(freedom: int, noncentrality: Tensor, squared: Tensor) -> Tensor:
    """log P(X < squared), X noncentral chi^2; 1/2 is returned where it would be more.

    The saddle point approximation of the lower tail, a quarter low at 2 and 4 degrees of freedom in
    the far tail and better elsewhere; float64 of any shape. With
    K(s) = log E exp(-s X) and s where -K'(s) = squared,
    exp(K + s squared + s^2 K'' / 2) Q(s sqrt(K'')).
    """
    root = (freedom**2 + 4.0 * squared * noncentrality).sqrt()
    u = ((freedom + root) / (2.0 * squared)).clamp_min(1.0)
    s = 0.5 * (u - 1.0)
    cumulant = -0.5 * freedom * u.log() - noncentrality * s / u
    curvature = 2.0 * freedom / u.square() + 4.0 * noncentrality / u**3
    exponent = cumulant + s * squared + 0.5 * s.square() * curvature
    tail: Tensor = torch.special.log_ndtr(-s * curvature.sqrt())
    return exponent + tail


def expected_near(spec: TrellisSpec, drift: float, *, n: int = TILE_WEIGHTS) -> float:
    """Expected share of tiles with a boundary within a drift, in the direction of that boundary.

    1 - exp(-sum over m of (N - m + 1) A_m P(d / 2 < t sqrt(n))), with d^2 = 2 chi^2 of m V degrees
    of freedom; the arguments are those of ``expected_escape``.
    """
    if drift <= 0.0:
        return 0.0
    steps, expected = spec.steps(n), 0.0
    for m, count in enumerate(detours(spec, steps), start=1):
        if count:
            chance = _log_lower_gamma(0.5 * m * spec.V, drift * drift * n)
            expected += math.exp(min(math.log(count * (steps - m + 1)) + chance, _CERTAIN))
    return 1.0 - math.exp(-expected)


def quantile(share: Callable[[float], float], level: float) -> float:
    """The drift at which a growing ``share`` of it reaches ``level``, between 0 and 1 sigma."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) < level else (low, middle)
    return high


def _log_lower_gamma(a: float, x: float) -> float:
    """log P(a, x), the regularised lower incomplete gamma function, by its power series."""
    term = total = 1.0 / a
    denominator = a
    while term > 1e-16 * total:
        denominator += 1.0
        term *= x / denominator
        total += term
    return min(0.0, a * math.log(x) - x - math.lgamma(a) + math.log(total))
