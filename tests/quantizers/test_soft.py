"""The four estimators."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softtrellis.codes.codebook import codebook
from softtrellis.quantizers.soft import estimate
from softtrellis.spec import TrellisSpec
from softtrellis.trellis import bcjr_torch
from softtrellis.trellis.bcjr import bcjr
from softtrellis.trellis.viterbi import viterbi

SPEC = TrellisSpec(6, 2, 1)


def setting() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    w = torch.randn(3, 16, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    C = codebook("gaussian", SPEC).double()
    return w.requires_grad_(), C, viterbi(w, C, SPEC).states[:, 0] >> 2


@pytest.mark.parametrize("estimator", ["soft", "straight_through", "mixed", "identity"])
def test_values_and_gradients(estimator: str) -> None:
    w, C, pins = setting()
    g = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(1))
    found = estimate(w, C, SPEC, estimator=estimator, temperature=0.2, pins=pins, mix=0.3)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad((found * g).sum(), w)
    soft = bcjr(w, C, SPEC, temperature=0.2, ends=pins).values
    (exact,) = torch.autograd.grad((soft * g).sum(), w)
    hard = viterbi(w, C, SPEC, ends=pins).values
    torch.testing.assert_close(found, soft if estimator == "soft" else hard)
    expected = {"identity": g, "mixed": 0.3 * exact + 0.7 * g}.get(estimator, exact)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("estimator", ["soft", "straight_through", "mixed"])
@pytest.mark.parametrize("temperature", [0.2, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)])
@pytest.mark.parametrize(("turn", "chosen"), [(0, [0, 2]), (1, [1]), (2, [0, 2]), (3, [1])])
def test_tiles_have_the_estimator_in_turn(
    turn: int, chosen: list[int], temperature: float | torch.Tensor, estimator: str
) -> None:
    w, C, pins = setting()
    g = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(1))
    how: dict[str, Any] = {"temperature": temperature, "pins": pins, "mix": 0.3}

    def values_and_gradient(name: str, **more: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = estimate(w, C, SPEC, estimator=name, **how, **more)  # type: ignore[arg-type]
        return found.detach(), torch.autograd.grad((found * g).sum(), w)[0]

    found = values_and_gradient(estimator, bcjr_stride=2, turn=turn)
    of_all, others = values_and_gradient(estimator), values_and_gradient("identity")
    for part, own, other in zip(found, of_all, others, strict=True):
        expected = other.clone()
        expected[chosen] = own[chosen]
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("estimator", ["straight_through", "mixed"])
def test_hard_values_are_the_code_to_the_bit(estimator: str) -> None:
    w, C, pins = setting()
    found = estimate(w, C, SPEC, estimator=estimator, temperature=0.2, pins=pins)  # type: ignore[arg-type]
    assert torch.equal(found, viterbi(w, C, SPEC, ends=pins).values)


@pytest.mark.parametrize("estimator", ["straight_through", "mixed"])
def test_hard_values_need_no_average(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the average was computed")

    monkeypatch.setattr(bcjr_torch, "soft_forward", refuse)
    w, C, pins = setting()
    found = estimate(w, C, SPEC, estimator=estimator, temperature=0.2, pins=pins, backend="torch")  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(found.square().sum(), w)
    assert bool(gradient.any())
    with pytest.raises(AssertionError, match="was computed"):
        estimate(w, C, SPEC, estimator="soft", temperature=0.2, pins=pins, backend="torch")


def test_a_turn_without_tiles_is_the_identity() -> None:
    w, C, pins = setting()
    how: dict[str, Any] = {"temperature": 0.2, "pins": pins}
    found = estimate(w, C, SPEC, estimator="soft", bcjr_stride=8, turn=5, **how)
    (gradient,) = torch.autograd.grad(found.sum(), w)
    torch.testing.assert_close(gradient, torch.ones_like(w))


@pytest.mark.parametrize("estimator", ["soft", "straight_through", "mixed", "identity"])
def test_gradient_of_the_codebook(estimator: str) -> None:
    w, C, pins = setting()
    w, C = w.detach(), C.requires_grad_()
    g = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(1))
    found = estimate(w, C, SPEC, estimator=estimator, temperature=0.2, pins=pins, mix=0.3)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad((found * g).sum(), C)
    states = viterbi(w, C, SPEC, ends=pins).states.to(torch.int64)
    own = torch.zeros_like(C).index_add(0, states.flatten(), g.flatten(0, 1))
    soft = bcjr(w, C, SPEC, temperature=0.2, ends=pins).values
    (exact,) = torch.autograd.grad((soft * g).sum(), C)
    expected = {"identity": own, "mixed": 0.3 * exact + 0.7 * own}.get(estimator, exact)
    torch.testing.assert_close(gradient, expected)


def test_unknown_estimator() -> None:
    w, C, pins = setting()
    with pytest.raises(ValueError, match="unknown estimator"):
        estimate(w, C, SPEC, estimator="hard", temperature=1.0, pins=pins)  # type: ignore[arg-type]
