"""The drift budget, against what AdamW does, and its verdicts."""

from __future__ import annotations

import math

import pytest
import torch

from softtrellis.recipes.drift import (
    MOST_LR,
    LearningRateSchedule,
    adam_bound,
    drift_budget,
    learning_rates,
    predict,
    predicted_radius,
    rate_of_walk,
    verdict,
)
from softtrellis.recipes.optimizer import BETAS


def travel(rates: list[float], gradients: torch.Tensor) -> torch.Tensor:
    """[n], what AdamW does to n weights with gradients [steps, n]."""
    weight = torch.nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=BETAS, eps=1e-30, weight_decay=0.0)
    for rate, gradient in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def test_the_rate_of_a_walk() -> None:
    for steps in (100, 1000):
        rate = rate_of_walk(steps, walk=0.05)
        travel = drift_budget(learning_rates(rate, steps)).random
        assert travel == pytest.approx(0.05)
    assert rate_of_walk(2) == MOST_LR
    assert rate_of_walk(1000, viterbi_every=8) == MOST_LR / 8 < rate_of_walk(1000)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        rate_of_walk(0)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_gradients_that_agree(schedule: LearningRateSchedule) -> None:
    rates = learning_rates(1e-2, 80, schedule=schedule)
    moved = travel(rates, torch.tensor([1.0, -3.0]).double().expand(80, 2))
    budget = drift_budget(rates)
    assert moved.abs().tolist() == pytest.approx([budget.consistent] * 2)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_gradients_of_random_sign(schedule: LearningRateSchedule) -> None:
    rates = learning_rates(1e-2, 150, warmup=20, schedule=schedule)
    signs = torch.randn(150, 4000, generator=torch.Generator().manual_seed(0)).sign().double()
    moved = travel(rates, signs)
    expected = drift_budget(rates).random
    assert float(moved.square().mean().sqrt()) == pytest.approx(expected, rel=0.1)


def test_no_gradients_move_a_weight_further() -> None:
    rates = learning_rates(1e-2, 200, schedule="constant", warmup=0)
    first, second = BETAS
    growing = (second / first) ** torch.arange(200).double()  # Cauchy-Schwarz as an equality
    gradients = torch.stack([growing, 1 / growing, torch.ones(200).double()], 1)
    moved, budget = travel(rates, gradients).abs(), drift_budget(rates)
    assert float(moved[0]) > 1.01 * budget.consistent
    assert bool((moved <= budget.most).all())
    last = travel(rates, gradients)[0] - travel(rates[:-1], gradients[:-1])[0]
    assert abs(float(last)) / 1e-2 == pytest.approx(adam_bound(), rel=1e-3)


def test_the_usual_betas_have_no_small_bound() -> None:
    assert adam_bound((0.9, 0.999)) == pytest.approx(0.1 / math.sqrt(0.001 * (1 - 0.81 / 0.999)))
    with pytest.raises(ValueError, match="betas"):
        adam_bound((0.9, 0.5))


def test_predictions() -> None:
    found = predict(65536, 1e-2, 100, warmup=0, schedule="constant", measured_radius=0.5)
    assert found.radius == predicted_radius(65536) == pytest.approx(0.0015584, rel=1e-4)
    assert found.budget.consistent == pytest.approx(1.0)
    assert found.budget.random == pytest.approx(0.1)
    assert found.verdict == "escapes"
    assert found.measured_verdict == "escapes only if gradients agree"
    assert predict(256, 1e-4, 100, sigma_w=0.02).radius == 0.02 * predicted_radius(256)
    assert predict(256, 1e-4, 100, sigma_w=1.0).verdict == "cannot leave its basin"
    assert predict(256, 1e-4, 100).measured_verdict is None


def test_verdicts() -> None:
    budget = drift_budget([0.1] * 4)
    names = ["escapes", "escapes only if gradients agree", "cannot leave its basin"]
    assert [verdict(budget, radius) for radius in (0.2, 0.3, 0.41)] == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"schedule": "linear"}, "unknown schedule 'linear'; use 'cosine' or 'constant'"),
    ],
)
def test_runs_that_make_no_sense(change: dict[str, float | str], message: str) -> None:
    settings = {"lr": 1e-2, "steps": 10, **change}
    with pytest.raises(ValueError, match=message):
        predict(256, **settings)  # type: ignore[arg-type]
