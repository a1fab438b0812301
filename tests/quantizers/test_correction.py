"""Weights corrected for the errors of the layers before, against least squares."""

from __future__ import annotations

import pytest
import torch

from softtrellis.quantizers.correction import corrected_weight


def moments(x: torch.Tensor, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.T @ x / len(x), original.T @ x / len(x)


def test_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(200, 12, generator=generator)
    x = original + 0.3 * torch.randn(200, 12, generator=generator)
    weight = torch.randn(7, 12, generator=generator)
    hessian, cross = moments(x, original)
    found = corrected_weight(weight, hessian, cross, 1e-9)
    expected = torch.linalg.lstsq(x, original @ weight.T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    damping = 0.3
    added = damping * hessian.diagonal().mean() * len(x)
    rows = torch.cat([x, added.sqrt() * torch.eye(12)])
    wanted = torch.cat([original @ weight.T, added.sqrt() * weight.T])
    found = corrected_weight(weight, hessian, cross, damping)
    torch.testing.assert_close(found, torch.linalg.lstsq(rows, wanted).solution.T)


def test_same_inputs_change_nothing_and_dead_ones_stay() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    x[:, 3] = 0
    weight = torch.randn(4, 8)
    torch.testing.assert_close(corrected_weight(weight, *moments(x, x), 0.01), weight)
    changed = corrected_weight(weight, *moments(x, 2 * x), 0.01)
    torch.testing.assert_close(changed[:, 3], weight[:, 3])


def test_moments_that_are_not_finite() -> None:
    x = torch.eye(4)
    with pytest.raises(ValueError, match="NaN"):
        corrected_weight(x, x, x * torch.nan, 0.01)
    with pytest.raises(ValueError, match="zero"):
        corrected_weight(x, 0 * x, x, 0.01)
