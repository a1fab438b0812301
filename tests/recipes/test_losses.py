"""The distillation loss, the schedules and the drift radius."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from softtrellis.recipes.drift import predicted_radius
from softtrellis.recipes.losses import forward_kl, kl_of_logits
from softtrellis.recipes.schedules import Pace, learning_rate_at, temperature_at


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_forward_kl_and_its_gradient(chunk: int) -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(8, 50), nn.Linear(6, 50)
    hidden = torch.randn(20, 8, requires_grad=True)
    target = torch.randn(20, 6)
    expected = nn.functional.kl_div(
        student(hidden).log_softmax(-1),
        teacher(target).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    (gradient,) = torch.autograd.grad(expected, hidden)
    loss = forward_kl(hidden, student, target, teacher, chunk=chunk)
    (found,) = torch.autograd.grad(3.0 * loss, hidden)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, 3.0 * gradient)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("vocabulary", [5, 2048, 5000])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_kl_of_logits_and_its_slope(backend: str, vocabulary: int, shift: float) -> None:
    kernel: Callable[..., Any] = partial(kl_of_logits, backend="torch")
    if backend == "triton":  # which on a CPU is interpreted
        pytest.importorskip("triton")
        kernel = import_module("softtrellis.recipes.losses_triton").kl_of_logits
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = 5 * torch.randn(6, vocabulary, device=device)
    q = p + 0.3 * torch.randn(6, vocabulary, device=device) + shift
    q[-1] = p[-1]
    exact = q.double().requires_grad_()
    expected = nn.functional.kl_div(
        exact.log_softmax(-1), p.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    before = p.clone(), q.clone()
    divergence, found = kernel(p, q, slope=True)
    torch.testing.assert_close(divergence.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.double(), slope, rtol=1e-4, atol=1e-6)
    alone, nothing = kernel(p, q, slope=False)
    assert nothing is None
    torch.testing.assert_close(alone, divergence)
    assert torch.equal(p, before[0])
    assert torch.equal(q, before[1])


@pytest.mark.parametrize("schedule", ["exponential", "cosine"])
def test_temperature_goes_from_start_to_end(schedule: str) -> None:
    found = [
        temperature_at(step / 10, t_init=0.1, t_min=0.03, schedule=schedule)  # type: ignore[arg-type]
        for step in range(11)
    ]
    assert found[0] == pytest.approx(0.1)
    assert found[-1] == pytest.approx(0.03)
    assert found == sorted(found, reverse=True)
    middle = math.sqrt(0.1 * 0.03) if schedule == "exponential" else 0.065
    assert found[5] == pytest.approx(middle)


def test_learning_rate_warms_up_and_decays() -> None:
    found = [learning_rate_at(step / 49, step, lr=1.0, warmup=5) for step in range(50)]
    first = [0.166667, 0.333025, 0.498153, 0.661134, 0.821069, 0.977075]
    assert found[:6] == pytest.approx(first, abs=1e-6)
    assert found[5:] == sorted(found[5:], reverse=True)
    assert found[-1] == pytest.approx(0.1)


def test_pace_by_steps() -> None:
    pace = Pace(5, None)
    assert [pace.share(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Pace(1, None).share(0) == 1.0


def test_pace_by_the_clock_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("softtrellis.recipes.schedules.time.monotonic", lambda: now)
    for step, elapsed, length in ((0, 0.0, 3.0), (4, 20.0, 7.0)):
        first = 5.0 if step else None
        pace = Pace(None, 100.0, step=step, elapsed=elapsed, first=first)
        began, shares = now, list[float]()
        while not shares or shares[-1] < 1:
            shares.append(pace.share(step + len(shares)))
            now += length
        assert shares == sorted(shares)
        assert 100 - 1.5 * length <= now - began + elapsed <= 100
    resumed = Pace(None, 100.0, step=4, elapsed=20.0, first=5.0)
    assert resumed.share(4) == pytest.approx(15 / 95)
    pace = Pace(3, 1e9)
    assert [pace.share(step) for step in range(3)] == pytest.approx([0.0, 0.5, 1.0])


def test_pace_by_the_clock_begins_after_a_first_step_that_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("softtrellis.recipes.schedules.time.monotonic", lambda: now)
    for first in (30.0, 70.0, 97.0):
        began, pace, shares = now, Pace(None, 100.0), list[float]()
        while not shares or shares[-1] < 1:
            shares.append(pace.share(len(shares)))
            now += 0.5 if len(shares) > 1 else first
        assert now - began == pytest.approx(100.0, abs=0.5)
        assert shares[:2] == [0.0, 0.0]
        wanted = torch.linspace(0, 1, len(shares) - 1).tolist()
        assert shares[1:] == pytest.approx(wanted, abs=2 / len(shares))


def test_predicted_radius() -> None:
    assert predicted_radius(65536) == pytest.approx(1 / math.sqrt(2 * math.pi * 65536))
