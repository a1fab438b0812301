"""Escape radii: exact distances to where hard codes change."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import admitted, all_paths
from torch import Tensor

from softtrellis.codes.codebook import codebook
from softtrellis.recipes.escape import boundary, escape_radius, escape_share, to_unit_rms
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bitshift import overlap_in
from softtrellis.trellis.viterbi import viterbi

TINY, STEPS, PIN = TrellisSpec(4, 1, 2), 6, 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_problem(tiles: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pins [B], all paths with these pins [P, N], tiles [B, N, V], and a codebook."""
    table = codebook("gaussian", TINY, seed=1).double()
    pins = torch.full((tiles,), PIN)
    return pins, admitted(all_paths(TINY, STEPS), TINY, PIN), randn(tiles, STEPS, 2), table


def crossing(latent: Tensor, ray: Tensor, table: Tensor, paths: Tensor) -> float:
    """Where a ray leaves the cell of the nearest of all paths, from every half-space of it."""
    values = table[paths]
    own = values[(values - latent).square().sum((1, 2)).argmin()]
    apart = values - own
    ahead = (apart * ray).sum((1, 2))
    distance = (apart * (0.5 * (values + own) - latent)).sum((1, 2)) / ahead
    reached = distance[ahead > 1e-12]
    return float(reached.min()) if reached.numel() else math.inf


def bisected(latent: Tensor, ray: Tensor, table: Tensor, spec: TrellisSpec, pins: Tensor) -> Tensor:
    """The radius by doubling and bisection."""

    def differs(t: Tensor) -> Tensor:
        moved = viterbi(latent + t[:, None, None] * ray, table, spec, ends=pins).states
        return (moved != start).any(1)

    start = viterbi(latent, table, spec, ends=pins).states
    high = torch.full_like(latent[:, 0, 0], 1e-3)
    for _ in range(14):
        high = torch.where(differs(high), high, 2 * high)
    low = torch.zeros_like(high)
    for _ in range(40):
        middle = 0.5 * (low + high)
        out = differs(middle)
        low, high = torch.where(out, low, middle), torch.where(out, middle, high)
    return high


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("at_codewords", [True, False])
def test_radius_against_all_half_spaces(seed: int, *, at_codewords: bool) -> None:
    pins, paths, latent, table = tiny_problem()
    if at_codewords:
        latent = viterbi(latent, table, TINY, ends=pins).values
    direction = randn(*latent.shape, seed=seed + 10)
    ray = to_unit_rms(direction)
    found = escape_radius(latent, direction, table, TINY, pins, maximum=50.0, tolerance=1e-6)
    expected = [crossing(w, r, table, paths) for w, r in zip(latent, ray, strict=True)]
    assert any(0 < radius < 50 for radius in expected)
    wanted = torch.tensor([radius if radius < 50 else math.inf for radius in expected])
    torch.testing.assert_close(found, wanted.double(), rtol=2e-6, atol=0)


def test_radius_against_bisection() -> None:
    spec = TrellisSpec(8, 2, 2)
    table = codebook("gaussian", spec)
    w = randn(16, 128, 2).float()
    path = viterbi(w, table, spec)
    pins, ray = overlap_in(path.states[:, 0], spec), to_unit_rms(randn(16, 128, 2, seed=1).float())
    found = escape_radius(path.values, 3.0 * ray, table, spec, pins, maximum=2.0, tolerance=1e-4)
    expected = bisected(path.values, ray, table, spec, pins)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=0)


def test_a_cell_is_convex() -> None:
    """Along a ray the code is the start's up to the radius, and never again behind it."""
    pins, _, latent, table = tiny_problem(8)
    ray = to_unit_rms(randn(*latent.shape, seed=5))
    radius = escape_radius(latent, ray, table, TINY, pins, maximum=4.0, tolerance=1e-9)
    start = viterbi(latent, table, TINY, ends=pins).states
    assert radius.isfinite().any()
    for t in torch.linspace(0, 4, 401).double():
        states = viterbi(latent + t * ray, table, TINY, ends=pins).states
        assert torch.equal((states != start).any(1), radius < t)


def test_nothing_up_to_the_maximum() -> None:
    pins, _, latent, table = tiny_problem()
    ray = randn(*latent.shape, seed=5)
    whole = escape_radius(latent, ray, table, TINY, pins, maximum=50.0)
    limit = float(whole.median())
    part = escape_radius(latent, ray, table, TINY, pins, maximum=limit * 1.01)
    assert torch.equal(part.isinf(), whole > limit * 1.01)
    torch.testing.assert_close(part[part.isfinite()], whole[part.isfinite()], rtol=2e-3, atol=0)
    still = escape_radius(latent, torch.zeros_like(ray), table, TINY, pins, maximum=50.0)
    assert still.isinf().all()


def test_between_two_paths() -> None:
    """A start on the plane between two codewords has the radius 0 towards the other one."""
    pins, paths, _, table = tiny_problem(1)
    squared = (table[paths] - table[paths[0]]).square().sum((1, 2))
    place = int(squared[1:].argmin()) + 1
    own, other = table[paths[0]], table[paths[place]]
    latent = (0.5 * (own + other))[None]
    path = viterbi(latent, table, TINY, ends=pins)
    if torch.equal(path.states[0].to(paths.dtype), paths[place]):
        own, other = other, own
    radius = escape_radius(latent, (other - own)[None], table, TINY, pins, maximum=1.0)
    assert float(radius) < 1e-9


@pytest.mark.parametrize("change", [{"maximum": 0.0}, {"tolerance": 0.0}, {"tolerance": 1.0}])
def test_what_is_refused(change: dict[str, float]) -> None:
    pins, _, latent, table = tiny_problem(1)
    with pytest.raises(ValueError, match="maximum must be positive"):
        escape_radius(latent, latent, table, TINY, pins, **{"maximum": 1.0, **change})
    with pytest.raises(ValueError, match="direction must be"):
        escape_radius(latent, latent[:, 1:], table, TINY, pins, maximum=1.0)


def test_boundary_against_all_paths() -> None:
    """The bounds are those of enumeration, and the code changes just beyond them."""
    _, paths, _, table = tiny_problem()
    chosen = paths[::43]
    found, pins = boundary(chosen, table, TINY), torch.full((1,), PIN)
    for i, path in enumerate(chosen):
        own = table[path]
        apart = (table[paths] - own)[(paths != path).any(1)]
        squared, length = apart.square().sum((1, 2)), apart.abs().sum((1, 2))
        nearest = apart[squared.argmin()]
        ratio = squared / (2 * length)
        radius = 0.5 * float(squared.min().sqrt()) / math.sqrt(own.numel())
        assert float(found.rms[i]) == pytest.approx(radius)
        assert float(found.per_weight[i]) == pytest.approx(float(ratio.min()), rel=1e-5)
        for ray, distance in (
            (to_unit_rms(nearest[None]), float(found.rms[i])),
            (apart[ratio.argmin()].sign()[None], float(found.per_weight[i])),
        ):
            for scale, changes in ((0.999, False), (1.001, True)):
                moved = viterbi(own + scale * distance * ray, table, TINY, ends=pins)
                assert torch.equal(moved.states[0].to(path.dtype), path) != changes


@pytest.mark.parametrize("L", [8, 12])
def test_no_direction_escapes_below_the_boundary(L: int) -> None:
    spec = TrellisSpec(L, 2, 2)
    table = codebook("gaussian", spec)
    path = viterbi(randn(8, 128, 2).float(), table, spec)
    pins, bound = overlap_in(path.states[:, 0], spec), boundary(path.states, table, spec)
    for seed in range(3):
        ray = to_unit_rms(randn(8, 128, 2, seed=seed + 1).float())
        radius = escape_radius(path.values, ray, table, spec, pins, maximum=2.0)
        assert bool((radius > bound.rms).all())
        assert bool((radius * ray.abs().amax((1, 2)) > bound.per_weight).all())
    signs = randn(8, 128, 2, seed=9).sign().float()
    moved = path.values + 0.999 * bound.per_weight[:, None, None] * signs
    assert torch.equal(viterbi(moved, table, spec, ends=pins).states, path.states)


def test_boundary_of_duplicate_codewords() -> None:
    """Paths that no codeword tells apart have no room at all."""
    table = torch.ones(TINY.num_states, 2)
    found = boundary(torch.zeros(1, STEPS, dtype=torch.int32), table, TINY)
    assert found.rms.tolist() == found.per_weight.tolist() == [0.0]


def test_boundary_of_a_path_that_is_alone() -> None:
    spec = TrellisSpec(6, 1, 2)
    found = boundary(admitted(all_paths(spec, 2), spec, 5), codebook("gaussian", spec), spec)
    assert found.rms.tolist() == found.per_weight.tolist() == [math.inf]


def test_escape_share_is_the_distribution_of_the_radii() -> None:
    radii = torch.tensor([0.1, 0.3, 0.2, math.inf])
    assert [escape_share(radii, t) for t in (0.05, 0.1, 0.25, 9.0)] == [0.0, 0.25, 0.5, 0.75]
