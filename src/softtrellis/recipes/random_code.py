"""What a trellis with a random Gaussian code leads one to expect of escape radii.

A path's neighbours are the paths that leave it once and come back. With independent N(0, 1) values
in every state, a neighbour that differs in m steps lies at the squared distance 2 chi^2 with m V
degrees of freedom. Escape along a random direction is then the event that a channel code fails in
white noise, and the union bound of coding theory (Viterbi, 1971) counts it. docs/drift.md has the
derivation and how well it fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from softtrellis.spec import TILE_WEIGHTS, TrellisSpec

_ANGLES = 2048
_BISECTIONS = 60
_CERTAIN = 1e3


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
    """1 / sqrt(2 (4**k - 1)) sigma: the union bound has no answer from here on."""
    return 1.0 / math.sqrt(2.0 * (4.0**k - 1.0))


def capacity_drift(k: int) -> float:
    """1 / sqrt(4**k - 1) sigma: no code of k bits per weight holds a random drift beyond it.

    Where Shannon's capacity of the Gaussian channel, log2(1 + 1 / t^2) / 2, falls to k bits.
    """
    return 1.0 / math.sqrt(4.0**k - 1.0)


def expected_escape(spec: TrellisSpec, drift: float, *, n: int = TILE_WEIGHTS) -> float:
    """Expected share of tiles that escape along a random direction within a drift.

    1 - exp(-sum over m of (N - m + 1) A_m E[Q(d / 2 t)]), with A_m ``detours`` and the mean over
    d^2 = 2 chi^2 of m V degrees of freedom in closed form by Craig's formula,
    E[Q(d / 2 t)] = (1 / pi) times the integral of (1 + 1 / (2 t^2 sin^2 x))**(-m V / 2) over x from
    0 to pi / 2.

    Args:
        spec: the trellis.
        drift: root mean square change t of a tile's weights, in sigma.
        n: weights of a tile.
    """
    if drift <= 0.0:
        return 0.0
    x = (torch.arange(_ANGLES, dtype=torch.float64) + 0.5) * (math.pi / 2 / _ANGLES)
    log_step = -0.5 * spec.V * torch.log1p(0.5 / (drift * x.sin()).square())

    def log_chance(m: int) -> float:
        return float(torch.logsumexp(m * log_step, 0)) - math.log(2.0 * _ANGLES)

    return 1.0 - math.exp(-_expected_neighbours(spec, n, log_chance))


def expected_near(spec: TrellisSpec, drift: float, *, n: int = TILE_WEIGHTS) -> float:
    """Expected share of tiles with a boundary within a drift, in the direction of that boundary.

    1 - exp(-sum over m of (N - m + 1) A_m P(d / 2 < t sqrt(n))), with d^2 as in
    ``expected_escape``; the arguments are those of ``expected_escape``.
    """
    if drift <= 0.0:
        return 0.0
    x = drift * drift * n

    def log_chance(m: int) -> float:
        return _log_lower_gamma(0.5 * m * spec.V, x)

    return 1.0 - math.exp(-_expected_neighbours(spec, n, log_chance))


def quantile(share: Callable[[float], float], level: float) -> float:
    """The drift at which a growing ``share`` of it reaches ``level``, between 0 and 1 sigma."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) < level else (low, middle)
    return high


def _expected_neighbours(spec: TrellisSpec, n: int, log_chance: Callable[[int], float]) -> float:
    steps, total = spec.steps(n), 0.0
    for m, count in enumerate(detours(spec, steps), start=1):
        if count:
            log_term = math.log(count * (steps - m + 1)) + log_chance(m)
            total += math.exp(min(log_term, math.log(_CERTAIN)))
        if total >= _CERTAIN:
            break
    return total


def _log_lower_gamma(a: float, x: float) -> float:
    """log P(a, x), the regularised lower incomplete gamma function, by its power series."""
    term = total = 1.0 / a
    denominator = a
    while term > 1e-16 * total:
        denominator += 1.0
        term *= x / denominator
        total += term
    return min(0.0, a * math.log(x) - x - math.lgamma(a) + math.log(total))
