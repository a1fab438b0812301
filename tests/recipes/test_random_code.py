"""What a random code leads one to expect, against counting, sampling and measuring."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import all_paths

from softtrellis.codes.codebook import codebook
from softtrellis.recipes.escape import boundary, escape_radius
from softtrellis.recipes.random_code import (
    capacity_drift,
    cutoff_drift,
    detours,
    expected_escape,
    expected_near,
    log_chance_nearer,
    quantile,
    shortest_detour,
)
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bitshift import overlap_in
from softtrellis.trellis.packing import unpack


@pytest.mark.parametrize(
    "spec",
    [TrellisSpec(4, 1, 2), TrellisSpec(4, 1, 1), TrellisSpec(5, 2, 1), TrellisSpec(7, 2, 2)],
    ids=str,
)
def test_detours_are_those_that_are_counted(spec: TrellisSpec) -> None:
    steps = 6 if spec.shift < 4 else 4
    found = []
    for m in range(1, steps + 1):
        paths = all_paths(spec, m)
        starts = paths[:, 0] >> spec.shift == 0
        ends = paths[:, -1] % spec.num_overlaps == 0
        apart = (paths[:, :-1] % spec.num_overlaps != 0).all(1)
        found.append(int((starts & ends & apart & (paths != 0).any(1)).sum()))
    assert detours(spec, steps) == tuple(found)


@pytest.mark.parametrize("L", [8, 10, 11, 12, 16])
def test_shortest_detour(L: int) -> None:
    spec = TrellisSpec(L, 2, 2)
    counts = detours(spec, 8)
    assert counts[shortest_detour(spec) - 1] > 0
    assert not any(counts[: shortest_detour(spec) - 1])


def test_no_drift_and_much_drift() -> None:
    spec = TrellisSpec(12, 2, 2)
    for share in (expected_escape, expected_near):
        assert share(spec, 0.0) == 0.0
        shares = [share(spec, t) for t in (0.001, 0.01, 0.1, 0.3)]
        assert shares == sorted(shares)
        assert shares[0] < 1e-6
        assert shares[-1] == pytest.approx(1.0)


def test_one_detour_near_by() -> None:
    """A tile of one possible detour, against sampled codes."""
    spec, t = TrellisSpec(4, 1, 1), 0.7
    assert detours(spec, 4) == (0, 0, 0, 1)
    apart = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0)) * math.sqrt(2)
    near = float((0.5 * apart.norm(dim=1) < t * 2).double().mean())
    assert -math.log1p(-expected_near(spec, t, n=4)) == pytest.approx(near, abs=4e-3)


@pytest.mark.parametrize("freedom", [2, 4, 12])
def test_chance_of_a_nearer_codeword(freedom: int) -> None:
    """The saddle point against sampled codewords around a point."""
    codewords = torch.randn(400_000, freedom, generator=torch.Generator().manual_seed(0)).double()
    point = torch.linspace(-1.0, 1.5, freedom).double()
    distances = (codewords - point).square().sum(1)
    for share in (0.002, 0.02, 0.3):
        squared = distances.quantile(share)
        found = log_chance_nearer(freedom, point.square().sum(), squared)
        assert float(found.exp()) == pytest.approx(share, rel=0.3)
    beyond = log_chance_nearer(freedom, point.square().sum(), distances.mean() * 2)
    assert float(beyond.exp()) == pytest.approx(0.5)


@pytest.mark.parametrize(("L", "V"), [(8, 2), (10, 2), (10, 1)])
def test_random_paths_of_a_gaussian_code_do_as_expected(L: int, V: int) -> None:
    spec = TrellisSpec(L, 2, V)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**15), 2**15, (128, 32), generator=generator).to(torch.int16)
    states, table = unpack(words, spec, steps=spec.steps()), codebook("gaussian", spec, seed=5)
    nearest = boundary(states, table, spec).rms
    expected = quantile(lambda t: expected_near(spec, t), 0.5)
    assert float(nearest.median()) == pytest.approx(expected, rel=0.15)
    latent = table[states.long()]
    radii = escape_radius(
        latent,
        torch.randn(latent.shape, generator=generator),
        table,
        spec,
        overlap_in(states[:, 0], spec),
        maximum=1.0,
    )
    expected = quantile(lambda t: expected_escape(spec, t), 0.5)
    assert float(radii.median()) == pytest.approx(expected, rel=0.1)


def test_limits() -> None:
    assert cutoff_drift(2) == pytest.approx(1 / math.sqrt(30))
    assert math.log2(1 + 1 / capacity_drift(3) ** 2) / 2 == pytest.approx(3)
