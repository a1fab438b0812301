"""The Triton kernels against the float64 reference.

Without a GPU they run under Triton's interpreter, on tiny trellises; with one, also at full size.
Every uninitialised tensor is filled with NaN first, so that what a kernel forgets to write shows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from softtrellis.codes.codebook import codebook
from softtrellis.spec import TrellisSpec
from softtrellis.trellis import bcjr_torch, bcjr_triton, viterbi_torch, viterbi_triton
from softtrellis.trellis.launch_triton import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Launch(tiles=2, block=8, warps=4, per_processor=1, choices=2, beta_block=8)
TINY = [
    (TrellisSpec(6, 2, 1), 4),
    (TrellisSpec(5, 1, 1), 5),
    (TrellisSpec(6, 2, 2), 3),
    (TrellisSpec(5, 2, 2), 2),
]
FULL = [
    (TrellisSpec(16, 2, 2), "hyb"),
    (TrellisSpec(16, 2, 1), "mul1"),
    (TrellisSpec(16, 4, 1), "3inst"),
    (TrellisSpec(12, 2, 2), "hyb"),
    (TrellisSpec(9, 4, 2), "gaussian"),
    (TrellisSpec(8, 1, 1), "1mad"),
]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def name_of(case: object) -> str:
    return f"L{case.L}k{case.k}V{case.V}" if isinstance(case, TrellisSpec) else str(case)


def problem(
    spec: TrellisSpec, steps: int, code: str, batch: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(spec.L * 100 + steps)
    w = torch.randn(batch, steps, spec.V, generator=generator)
    w[0, steps // 2] = 6.0
    w[-1, 0, -1] = -5.0
    return w.to(DEVICE), codebook(code, spec, seed=2).to(DEVICE)


def pinned_overlaps(spec: TrellisSpec, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(spec.num_overlaps, (batch,), generator=generator).to(DEVICE)


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    assert bool(torch.isfinite(ours).all())
    return float((ours.double() - exact).norm() / exact.norm())


def check_bcjr(
    w: torch.Tensor,
    table: torch.Tensor,
    spec: TrellisSpec,
    T: torch.Tensor,
    pins: torch.Tensor | None,
    launch: Launch | None,
    tolerance: float,
) -> None:
    generator = torch.Generator().manual_seed(7)
    g = torch.randn(w.shape, generator=generator).to(w)
    grad_z = 0.1 * torch.randn(w.shape[0], generator=generator).to(w)
    exact = bcjr_torch.soft_forward(w.double(), table.double(), spec, T.double(), pins, True)
    ours = bcjr_triton.soft_forward(w, table, spec, T, pins, True, launch)
    for mine, right in zip(ours, exact, strict=True):
        assert mine is not None
        assert right is not None
        assert relative(mine, right) < tolerance
    upstream = (g.double(), grad_z.double())
    right_w, right_c = bcjr_torch.soft_backward(
        w.double(), table.double(), spec, T.double(), pins, exact[0], *upstream, True
    )
    mine_w, mine_c = bcjr_triton.soft_backward(
        w, table, spec, T, pins, ours[0], g, grad_z, True, launch
    )
    assert mine_c is not None
    assert right_c is not None
    assert relative(mine_w, right_w) < tolerance
    assert relative(mine_c, right_c) < 10 * tolerance
    hard = table[viterbi_torch.best_path(w.double(), table.double(), spec, pins)]
    passed = bcjr_triton.soft_backward(w, table, spec, T, pins, hard, g, None, True, launch)
    expected = bcjr_torch.soft_backward(
        w.double(), table.double(), spec, T.double(), pins, exact[0], g.double(), None, True
    )
    for mine, right, factor in zip(passed, expected, (1, 10), strict=True):
        assert mine is not None
        assert right is not None
        assert relative(mine, right) < factor * tolerance
    if DEVICE == "cuda":
        alone, nothing = bcjr_triton.soft_backward(
            w, table, spec, T, pins, ours[0], g, grad_z, False, launch
        )
        assert nothing is None
        assert relative(alone, right_w) < tolerance


@pytest.mark.parametrize("ends", ["free", "pinned"])
@pytest.mark.parametrize(("spec", "steps"), TINY, ids=name_of)
def test_viterbi_finds_the_path_of_the_reference(spec: TrellisSpec, steps: int, ends: str) -> None:
    w, table = problem(spec, steps, "gaussian")
    pins = pinned_overlaps(spec, 3) if ends == "pinned" else None
    ours = viterbi_triton.best_path(w, table, spec, pins, SMALL)
    assert ours.dtype == torch.int32
    assert torch.equal(ours, viterbi_torch.best_path(w.double(), table.double(), spec, pins))


@pytest.mark.parametrize(
    ("ends", "T"), [("free", (0.05, 0.3, 2.0)), ("pinned", (0.02, 0.03, 100.0))]
)
@pytest.mark.parametrize(("spec", "steps"), TINY, ids=name_of)
def test_bcjr_and_its_gradients(
    spec: TrellisSpec, steps: int, ends: str, T: tuple[float, ...]
) -> None:
    w, table = problem(spec, steps, "gaussian")
    pins = pinned_overlaps(spec, 3) if ends == "pinned" else None
    temperature = torch.tensor(T, device=DEVICE)
    check_bcjr(w, table, spec, temperature, pins, SMALL, 2e-5 if ends == "free" else 1e-4)


def test_no_tiles() -> None:
    spec = TrellisSpec(6, 2, 1)
    w, table = problem(spec, 4, "gaussian")
    T = torch.ones(0, device=DEVICE)
    assert viterbi_triton.best_path(w[:0], table, spec, None).shape == (0, 4)
    values, log_z, _ = bcjr_triton.soft_forward(w[:0], table, spec, T, None, False)
    assert values.shape == (0, 4, 1)
    grad, grad_table = bcjr_triton.soft_backward(
        w[:0], table, spec, T, None, values, values, log_z, True
    )
    assert grad.shape == values.shape
    assert grad_table is not None
    assert not bool(grad_table.any())


@pytest.mark.parametrize("tangent", [False, True])
def test_only_the_tiles_that_were_chosen(tangent: bool) -> None:
    spec = TrellisSpec(6, 2, 1)
    w, table = problem(spec, 4, "gaussian", batch=5)
    T = torch.full((5,), 0.1, device=DEVICE)
    values, log_z, _ = bcjr_triton.soft_forward(w, table, spec, T, None, False, SMALL)
    upstream = {"grad_values": torch.ones_like(w), "grad_log_z": log_z} if tangent else {}
    outputs = [torch.full_like(w, 7.0), torch.full_like(log_z, 7.0), torch.full_like(w, 7.0)]
    chosen = (torch.tensor([4, 1, 0, 0, 0], device=DEVICE).int(), torch.tensor(2).int().to(DEVICE))
    bcjr_triton.sweep(
        w,
        table,
        spec,
        T,
        None,
        values.clone() if tangent else outputs[0],
        log_z=None if tangent else outputs[1],
        grad_w=outputs[2] if tangent else None,
        chosen=chosen,
        launch=SMALL,
        **upstream,
    )
    right = values
    if tangent:
        right, _ = bcjr_triton.soft_backward(
            w, table, spec, T, None, values, **upstream, with_codebook=False, launch=SMALL
        )
    found = outputs[2] if tangent else outputs[0]
    torch.testing.assert_close(found[[1, 4]], right[[1, 4]])
    assert bool((found[[0, 2, 3]] == 7.0).all())
    states = torch.full((5, 4), 7, dtype=torch.int32, device=DEVICE)
    viterbi_triton.fill(w, table, spec, None, states, chosen[1], SMALL)
    best = viterbi_triton.best_path(w, table, spec, None, SMALL)
    assert torch.equal(states[:2], best[:2])
    assert bool((states[2:] == 7).all())


@pytest.mark.gpu
@pytest.mark.parametrize("ends", ["free", "pinned"])
@pytest.mark.parametrize(("spec", "code"), FULL, ids=name_of)
def test_viterbi_at_full_size(spec: TrellisSpec, code: str, ends: str) -> None:
    for batch, steps in ((1, spec.steps()), (7, 37)):
        w, table = problem(spec, steps, code, batch)
        pins = pinned_overlaps(spec, batch) if ends == "pinned" else None
        ours = viterbi_triton.best_path(w, table, spec, pins)
        best = viterbi_torch.best_path(w.double(), table.double(), spec, pins)
        costs = [(table.double()[s.long()] - w).square().sum((1, 2)) for s in (ours, best)]
        torch.testing.assert_close(*costs, rtol=1e-6, atol=0)
        assert torch.equal(ours[:, :-1] % spec.num_overlaps, ours[:, 1:] >> spec.shift)


def test_the_lowest_temperature_stays_finite() -> None:
    spec = TrellisSpec(5, 2, 1)
    w, table = problem(spec, 4, "gaussian")
    T = torch.full((3,), 0.005, device=DEVICE)
    pins = pinned_overlaps(spec, 3)
    values, log_z, _ = bcjr_triton.soft_forward(w, table, spec, T, pins, False, SMALL)
    exact = bcjr_torch.soft_forward(w.double(), table.double(), spec, T.double(), pins, False)
    assert relative(values, exact[0]) < 1e-3
    assert relative(log_z, exact[1]) < 1e-5
    grad, _ = bcjr_triton.soft_backward(
        w, table, spec, T, pins, values, torch.ones_like(w), log_z, False, SMALL
    )
    assert bool(torch.isfinite(grad).all())


@pytest.mark.gpu
@pytest.mark.parametrize("ends", ["free", "pinned"])
@pytest.mark.parametrize("T", [100.0, 0.3, 0.05, 0.03, 0.02, 0.005])
@pytest.mark.parametrize(("spec", "code"), FULL, ids=name_of)
def test_bcjr_at_full_size(spec: TrellisSpec, code: str, T: float, ends: str) -> None:
    w, table = problem(spec, spec.steps(), code)
    pins = pinned_overlaps(spec, 3) if ends == "pinned" else None
    temperature = torch.full((3,), T, device=DEVICE)
    check_bcjr(w, table, spec, temperature, pins, None, 2e-5 if T >= 0.05 else 1e-4)


@pytest.mark.gpu
def test_twenty_runs_agree() -> None:
    spec = TrellisSpec(16, 2, 2)
    w, table = problem(spec, spec.steps(), "hyb", batch=37)
    T = torch.full((37,), 0.03, device=DEVICE)
    first = bcjr_triton.soft_forward(w, table, spec, T, None, False)[0]
    for _ in range(19):
        again = bcjr_triton.soft_forward(w, table, spec, T, None, False)[0]
        torch.testing.assert_close(again, first, rtol=1e-6, atol=1e-6)
