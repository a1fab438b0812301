"""The judge of kernels: right ones pass, wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from softtrellis.codes.codebook import codebook
from softtrellis.recipes import parity
from softtrellis.recipes.parity import Referee, poisoned, short, soft_tolerance
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bcjr import SoftPath, bcjr
from softtrellis.trellis.bitshift import overlap_in
from softtrellis.trellis.viterbi import Path, viterbi

SPEC = TrellisSpec(8, 2, 1)
Change = Callable[[Any], Any]


def referee(spec: TrellisSpec = SPEC, probes: int = 2, seed: int = 0) -> Referee:
    generator = torch.Generator().manual_seed(seed)
    return Referee(spec, codebook("gaussian", spec), generator, probes)


@pytest.mark.parametrize("probes", [2, 5])
@pytest.mark.parametrize("tiles", [1, 6])
@pytest.mark.parametrize("spec", [SPEC, TrellisSpec(7, 3, 2)], ids=["V1", "V2"])
def test_right_kernels_pass(spec: TrellisSpec, tiles: int, probes: int) -> None:
    judge = referee(spec, probes)
    for T in (0.3, 0.03):
        found = judge.soft(T, tiles, "cpu", gradient=True)
        assert found.wrong is None
        assert list(found.errors) == ["values", "log_z", "gradient"]
        assert 0 < max(found.errors.values()) <= soft_tolerance(T)
    assert list(judge.soft(0.3, tiles, "cpu", gradient=False).errors) == ["values", "log_z"]
    for ends in ("free", "pinned", "tail_biting"):
        hard = judge.hard(ends, tiles, "cpu")
        assert hard.wrong is None
        assert ("seam" in hard.errors) == (ends == "tail_biting")


def slightly(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + 1e-4)


def one_hole(x: torch.Tensor) -> torch.Tensor:
    hole = torch.zeros_like(x, dtype=torch.bool)
    hole.view(-1)[-1] = True
    return x.masked_fill(hole, torch.nan)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (1 + 1e-3)


SOFT: dict[str, tuple[Change, str]] = {
    "values": (lambda s: replace(s, values=slightly(s.values)), "values 1e-4 > 2e-5"),
    "log_z": (lambda s: replace(s, log_z=s.log_z + 1), "log_z "),
    "gradient": (lambda s: replace(s, values=ScaledGradient.apply(s.values)), "gradient 1e-3 > "),
    "unwritten": (lambda s: replace(s, values=one_hole(s.values)), "values not finite"),
    "untouched": (
        lambda s: replace(s, values=s.values + torch.empty_like(s.values)),
        "values not finite",
    ),
    "neighbour": (lambda s: replace(s, values=s.values.roll(1, 0)), "values "),
}


@pytest.mark.parametrize("name", SOFT)
def test_a_wrong_bcjr_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = SOFT[name]

    def wrong(*arguments: Any, **options: Any) -> SoftPath:
        soft = bcjr(*arguments, **options)
        return soft if options["backend"] == "torch" else change(soft)

    monkeypatch.setattr(parity, "bcjr", wrong)
    found = referee().soft(0.3, 8, "cpu", gradient=True)
    assert found.wrong is not None
    assert found.wrong.startswith(message)


def test_pinned_ends_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> SoftPath:
        if options["backend"] != "torch":
            options["ends"] = "free"
        return bcjr(*arguments, **options)

    monkeypatch.setattr(parity, "bcjr", wrong)
    found = referee().soft(0.3, 4, "cpu", gradient=False)
    assert found.wrong is not None


def other_seam(w: torch.Tensor, C: torch.Tensor, seam: torch.Tensor) -> Path:
    return viterbi(w, C, SPEC, ends=(seam + 1) % SPEC.num_overlaps, backend="cpu")


def costlier(w: torch.Tensor, C: torch.Tensor, seam: torch.Tensor) -> Path:
    """The best path for slightly other weights, with its true cost."""
    path = viterbi(w * 0.9, C, SPEC, ends=seam, backend="cpu")
    cost = (path.values.double() - w).square().sum((1, 2)).float()
    return replace(path, cost=cost)


def scrambled(w: torch.Tensor, C: torch.Tensor, seam: torch.Tensor) -> Path:
    path = viterbi(w, C, SPEC, backend="cpu")
    return replace(path, states=path.states.flip(1))


def untouched(w: torch.Tensor, C: torch.Tensor, seam: torch.Tensor) -> Path:
    path = viterbi(w, C, SPEC, backend="cpu")
    return replace(path, states=torch.empty_like(path.states))


def cheaper(w: torch.Tensor, C: torch.Tensor, seam: torch.Tensor) -> Path:
    path = viterbi(w, C, SPEC, backend="cpu")
    return replace(path, cost=path.cost * 0.999)


HARD = {
    other_seam: "seam ",
    costlier: "excess ",
    scrambled: "states are not a path",
    untouched: "states must lie in",
    cheaper: "cost 1e-3 > 1e-6",
}


@pytest.mark.parametrize("change", HARD, ids=lambda change: change.__name__)
def test_a_wrong_viterbi_is_refused(
    change: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(w: torch.Tensor, C: torch.Tensor, spec: TrellisSpec, **options: Any) -> Path:
        path = viterbi(w, C, spec, **options)
        if options["backend"] == "torch":
            return path
        return change(w, C, overlap_in(path.states[:, 0], spec).long())

    monkeypatch.setattr(parity, "viterbi", wrong)
    found = referee().hard("tail_biting", 8, "cpu")
    assert found.wrong is not None
    assert found.wrong.startswith(HARD[change])


def test_a_path_pinned_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(w: torch.Tensor, C: torch.Tensor, spec: TrellisSpec, **options: Any) -> Path:
        return viterbi(w, C, spec, **{**options, "ends": "tail_biting"})

    monkeypatch.setattr(parity, "viterbi", wrong)
    found = referee().hard("pinned", 8, "cpu")
    assert found.wrong == "paths do not start where they are pinned"


def test_inputs_are_fresh() -> None:
    judge = referee()
    first, second = (judge._hide(6, slice(None)) for _ in range(2))
    assert not torch.equal(first.w, second.w)
    for batch in (first, second):
        assert torch.equal(batch.w[batch.rows], judge._w[batch.which])
        assert 1 <= len(batch.rows) <= 6


def test_poison_is_taken_back() -> None:
    with poisoned():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("x", "text"), [(3.14e-4, "3.1e-4"), (2e-5, "2e-5"), (0.0, "0e0")])
def test_short(x: float, text: str) -> None:
    assert short(x) == text
