"""The fast backends against the float64 reference: one test for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from softtrellis.backend import Backend
from softtrellis.codes.codebook import codebook
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bcjr import bcjr, pass_back
from softtrellis.trellis.bitshift import check_path
from softtrellis.trellis.viterbi import viterbi

BACKENDS = ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda"))]
SPECS = [
    TrellisSpec(L, k, V) for L in (4, 6, 8, 9) for k in (1, 2, 3, 4) for V in (1, 2) if k * V < L
] + [TrellisSpec(10, 2, 2), TrellisSpec(12, 2, 2), TrellisSpec(12, 2, 1)]
TEMPERATURES = [0.005, 0.02, 0.05, 0.3, 2.0, 100.0]


def on_device(backend: Backend, spec: TrellisSpec) -> torch.device:
    """Where a backend runs; skips trellises that it is not made for."""
    if backend == "cpu":
        return torch.device("cpu")
    if spec.L < 8:
        pytest.skip("the kernels for GPUs take L of 8 to 16")
    return torch.device("cuda")


def spec_id(spec: TrellisSpec) -> str:
    return f"L{spec.L}k{spec.k}V{spec.V}"


def tiles(spec: TrellisSpec, batch: int, steps: int, *, outliers: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + steps)
    w = torch.randn(batch, steps, spec.V, generator=generator)
    if outliers:
        w[0, steps // 2] = 6.0
        w[-1, 0] = -8.0
    return w


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def tolerance(temperature: float) -> float:
    return 2e-5 if temperature >= 0.05 else 1e-4


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ends", ["free", "pinned"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_bcjr_and_its_gradients(spec: TrellisSpec, ends: str, backend: Backend) -> None:
    batch, steps = (5, 11) if spec.L < 10 else (2, 16)
    device = on_device(backend, spec)
    w, C = tiles(spec, batch, steps).to(device), codebook("gaussian", spec, seed=7).to(device)
    pins = torch.arange(batch, device=device) * 5 % spec.num_overlaps
    given = pins if ends == "pinned" else "free"
    T = torch.tensor(TEMPERATURES)[torch.arange(batch) % 4 + 1]
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(w.shape, generator=generator)
    g_log_z = 0.01 * torch.randn(batch, generator=generator)

    def run(w: Tensor, C: Tensor, backend: Backend) -> list[Tensor]:
        w, C = w.clone().requires_grad_(), C.clone().requires_grad_()
        soft = bcjr(
            w, C, spec, temperature=T.to(w), ends=given, return_entropy=True, backend=backend
        )
        assert soft.entropy is not None
        loss = (soft.values * g.to(w)).sum() + (soft.log_z * g_log_z.to(w)).sum()
        return [soft.values.detach(), soft.log_z.detach(), *torch.autograd.grad(loss, (w, C))]

    expected = run(w.double(), C.double(), "torch")
    found = run(w, C, backend)
    for name, x, y in zip(
        ("values", "log_z", "grad_w", "grad_codebook"), found, expected, strict=True
    ):
        assert relative_error(x, y) <= 1e-4, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("name", "spec"),
    [("hyb", TrellisSpec(12, 2, 2)), ("mul1", TrellisSpec(10, 2, 1))],
    ids=["hyb-L12V2", "mul1-L10V1"],
)
@pytest.mark.parametrize("ends", ["free", "pinned"])
def test_accuracy_at_every_temperature(
    name: str, spec: TrellisSpec, temperature: float, ends: str, backend: Backend
) -> None:
    device = on_device(backend, spec)
    w, C = tiles(spec, 3, 48).to(device), codebook(name, spec).to(device)
    given = torch.tensor([0, 1, 2], device=device) if ends == "pinned" else "free"
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(3))

    def run(w: Tensor, C: Tensor, backend: Backend) -> list[Tensor]:
        w, C = w.clone().requires_grad_(), C.clone().requires_grad_()
        soft = bcjr(
            w, C, spec, temperature=temperature, ends=given, return_entropy=True, backend=backend
        )
        assert soft.entropy is not None
        gradients = torch.autograd.grad((soft.values * g.to(w)).sum(), (w, C))
        return [soft.values.detach(), soft.log_z.detach(), soft.entropy, *gradients]

    expected = run(w.double(), C.double(), "torch")
    found = run(w, C, backend)
    names = ("values", "log_z", "entropy", "grad_w", "grad_codebook")
    for what, x, y in zip(names, found, expected, strict=True):
        assert bool(torch.isfinite(x).all()), what
        if what == "entropy":
            torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-4)
        else:
            assert relative_error(x, y) <= tolerance(temperature), what


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ends", ["free", "pinned", "tail_biting"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_viterbi_finds_paths_of_the_same_cost(
    spec: TrellisSpec, ends: str, backend: Backend
) -> None:
    device = on_device(backend, spec)
    w, C = tiles(spec, 7, 13).to(device), codebook("gaussian", spec, seed=7).to(device)
    pins = torch.arange(7, device=device) * 3 % spec.num_overlaps
    given = pins if ends == "pinned" else ends
    found = viterbi(w, C, spec, ends=given, backend=backend)
    expected = viterbi(w.double(), C.double(), spec, ends=given, backend="torch")
    check_path(found.states, spec, tail_biting=ends != "free")
    if ends == "pinned":
        assert torch.equal(found.states[:, 0] >> spec.shift, pins.int())
    torch.testing.assert_close(found.cost.double(), expected.cost, rtol=2e-6, atol=1e-5)
    assert torch.equal(found.values, C[found.states.long()])
    assert float((found.states == expected.states).double().mean()) > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_tiles_do_not_see_each_other(batch: int, backend: Backend) -> None:
    spec = TrellisSpec(8, 2, 1)
    device = on_device(backend, spec)
    w, C = tiles(spec, 7, 20).to(device), codebook("gaussian", spec).to(device)
    together = bcjr(w, C, spec, temperature=0.2, backend=backend).values
    path = viterbi(w, C, spec, backend=backend).states
    for first in range(0, 7, batch):
        part = w[first : first + batch]
        alone = bcjr(part, C, spec, temperature=0.2, backend=backend).values
        assert torch.equal(alone, together[first : first + batch])
        assert torch.equal(
            viterbi(part, C, spec, backend=backend).states, path[first : first + batch]
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("spec", [TrellisSpec(12, 2, 2), TrellisSpec(10, 2, 1)], ids=spec_id)
@pytest.mark.parametrize("ends", ["free", "pinned"])
@pytest.mark.parametrize("with_codebook", [False, True])
def test_the_gradient_alone_is_that_of_the_average(
    with_codebook: bool, ends: str, spec: TrellisSpec, temperature: float, backend: Backend
) -> None:
    device = on_device(backend, spec)
    w = tiles(spec, 3, 48).to(device)
    C = codebook("hyb" if spec.V == 2 else "mul1", spec).to(device)
    given = torch.tensor([0, 1, 2], device=device) if ends == "pinned" else "free"
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    hard = viterbi(w, C, spec, ends=given, backend=backend).values
    how: dict[str, Any] = {"temperature": temperature, "ends": given}
    exact = w.double().requires_grad_(), C.double().requires_grad_()
    soft = bcjr(*exact, spec, **how, backend="torch").values
    expected = torch.autograd.grad((soft * g.to(soft)).sum(), exact)
    mine = w.requires_grad_(), C.requires_grad_(with_codebook)
    passed = pass_back(hard, *mine, spec, **how, backend=backend)
    assert torch.equal(passed, hard)
    found = torch.autograd.grad((passed * g.to(w)).sum(), mine[: 1 + with_codebook])
    for x, y in zip(found, expected, strict=False):
        assert bool(torch.isfinite(x).all())
        assert relative_error(x, y) <= tolerance(temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_empty_inputs(backend: Backend) -> None:
    spec = TrellisSpec(8, 2, 2)
    device = on_device(backend, spec)
    C = codebook("gaussian", spec).to(device)
    wide = torch.randn(4, 2, 24, generator=torch.Generator().manual_seed(0))
    strided = wide.to(device).transpose(1, 2)
    assert not strided.is_contiguous()
    for function in (
        lambda w: bcjr(w, C, spec, temperature=0.3, backend=backend).values,
        lambda w: viterbi(w, C, spec, backend=backend).states,
        lambda w: gradient_of_hard_values(w, C, spec, backend),
    ):
        assert torch.equal(function(strided), function(strided.contiguous()))
        assert function(strided[:0]).shape[0] == 0


def gradient_of_hard_values(w: Tensor, C: Tensor, spec: TrellisSpec, backend: Backend) -> Tensor:
    w = w.detach().requires_grad_()
    hard = viterbi(w, C, spec, backend=backend).values
    passed = pass_back(hard, w, C, spec, temperature=0.3, backend=backend)
    (gradient,) = torch.autograd.grad(passed.square().sum(), w)
    return gradient


def test_what_cannot_be_passed_back() -> None:
    spec = TrellisSpec(6, 2, 1)
    w, C = torch.zeros(2, 8, 1), codebook("gaussian", spec)
    with pytest.raises(ValueError, match=r"must be \[2, 8, 1\] on cpu like w, got \[2, 4, 1\]"):
        pass_back(w[:, :4], w, C, spec, temperature=0.1)
    with pytest.raises(ValueError, match="takes ends 'free' or overlaps, got 'tail_biting'"):
        pass_back(w, w, C, spec, temperature=0.1, ends="tail_biting")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be positive"):
        pass_back(w, w, C, spec, temperature=0.0)
    with pytest.raises(ValueError, match="float32 tensors on a CUDA device"):
        pass_back(w, w, C, spec, temperature=0.1, backend="cuda")


def test_backends_that_cannot_run_say_so() -> None:
    spec = TrellisSpec(8, 2, 1)
    w, C = torch.zeros(1, 8, 1), codebook("gaussian", spec)
    with pytest.raises(ValueError, match="float32 tensors on the CPU"):
        viterbi(w.double(), C, spec, backend="cpu")
    with pytest.raises(ValueError, match="float32 tensors on a CUDA device"):
        viterbi(w, C, spec, backend="triton")
    with pytest.raises(ValueError, match="float32 tensors on a CUDA device"):
        viterbi(w, C, spec, backend="cuda")
