"""``bcjr`` and ``viterbi`` as operators: torch.compile, CUDA graphs and what autograd is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_graph import capture
from torch import Tensor

from softtrellis.backend import Backend
from softtrellis.codes.codebook import codebook
from softtrellis.spec import TrellisSpec
from softtrellis.trellis import bcjr_torch
from softtrellis.trellis.bcjr import bcjr, pass_back
from softtrellis.trellis.validation import Ends
from softtrellis.trellis.viterbi import viterbi

SPEC = TrellisSpec(8, 2, 1)
SIZES = (SPEC.L, SPEC.k, SPEC.V)
BACKENDS = [
    "torch",
    "cpu",
    *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")),
]
OPS = torch.ops.softtrellis


def problem(
    backend: Backend = "cpu", batch: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [B, N, V], their codebook, temperatures [B] and overlaps [B]."""
    device = "cuda" if backend in ("triton", "cuda") else "cpu"
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(batch, 12, SPEC.V, generator=generator)
    T = 0.05 + torch.rand(batch, generator=generator)
    pins = torch.randint(SPEC.num_overlaps, (batch,), generator=generator)
    return w.to(device), codebook("gaussian", SPEC).to(device), T.to(device), pins.to(device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ends", ["free", "pinned"])
def test_operators_are_what_they_say(ends: str, backend: Backend) -> None:
    w, C, T, overlaps = problem(backend)
    pins = overlaps if ends == "pinned" else None
    for optional in (False, True):
        given = (w.clone().requires_grad_(), C.clone().requires_grad_(optional), T, pins)
        torch.library.opcheck(OPS.soft_forward, (*given, *SIZES, optional, backend))
        given = (w, C, T, pins, w + 1, w - 1, T)
        torch.library.opcheck(OPS.soft_backward, (*given, *SIZES, optional, backend))
        torch.library.opcheck(OPS.soft_backward, (*given[:-1], None, *SIZES, optional, backend))
        given = (w - 1, w.clone().requires_grad_(), C.clone().requires_grad_(optional), T, pins)
        torch.library.opcheck(OPS.pass_back, (*given, *SIZES, backend))
    for tail_biting in (False, True):
        torch.library.opcheck(OPS.best_path, (w, C, pins, tail_biting, *SIZES, backend))


def compiled(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    torch.compiler.reset()
    compiled: Callable[..., list[Tensor]] = torch.compile(
        function, fullgraph=True, backend="aot_eager"
    )
    return compiled


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ends", ["free", "pinned", "tail_biting"])
def test_compiled_is_eager(ends: str, backend: Backend) -> None:
    w, C, T, overlaps = problem(backend)
    w, C = w.requires_grad_(), C.requires_grad_()
    given: Ends = overlaps if ends == "pinned" else ends  # type: ignore[assignment]

    def step(w: Tensor, C: Tensor, temperature: float | Tensor) -> list[Tensor]:
        path = viterbi(w, C, SPEC, ends=given, backend=backend)
        soft_ends = path.states[:, 0] >> SPEC.shift if ends == "tail_biting" else given
        soft = bcjr(
            w,
            C,
            SPEC,
            temperature=temperature,
            ends=soft_ends,
            return_entropy=True,
            backend=backend,
        )
        assert soft.entropy is not None
        return [soft.values, soft.log_z, soft.entropy, path.states, path.values, path.cost]

    def with_gradients(
        step: Callable[..., list[Tensor]], temperature: float | Tensor
    ) -> list[Tensor]:
        results = step(w, C, temperature)
        loss = results[0].square().sum() + results[1].sum()
        return [*results, *torch.autograd.grad(loss, (w, C))]

    for temperature in (T, 0.3, 0.2, 0.1):
        found = with_gradients(compiled(step), temperature)
        for one, other in zip(found, with_gradients(step, temperature), strict=True):
            torch.testing.assert_close(one, other)
            assert one.requires_grad == other.requires_grad


def test_compiled_exact_tail_biting() -> None:
    w, C, _, _ = problem()
    spec = TrellisSpec(6, 4, 1)
    C = codebook("gaussian", spec)

    def step(w: Tensor) -> list[Tensor]:
        path = viterbi(w, C, spec, ends="tail_biting_exact")
        soft = bcjr(w, C, spec, temperature=0.3, ends="tail_biting", return_entropy=True)
        assert soft.entropy is not None
        return [soft.values, soft.log_z, soft.entropy, path.cost]

    for one, other in zip(compiled(step)(w), step(w), strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_gradients_without_the_average() -> None:
    w, C, T, pins = problem()

    def step(w: Tensor) -> list[Tensor]:
        return [pass_back(w.detach().round(), w, C, SPEC, temperature=T, ends=pins)]

    found = []
    for function in (compiled(step), step):
        x = w.clone().requires_grad_()
        (passed,) = function(x)
        found.append((passed.detach(), *torch.autograd.grad(passed.square().sum(), x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert bool(found[0][1].any())


def test_compiled_refuses_a_number_but_cannot_see_values() -> None:
    w, C, _, _ = problem()

    def values(w: Tensor, temperature: float | Tensor) -> list[Tensor]:
        return [bcjr(w, C, SPEC, temperature=temperature).values]

    with pytest.raises(Exception, match="positive and finite"):
        compiled(values)(w, -1.0)
    w[0, 0] = torch.nan
    compiled(values)(w, torch.full((3,), 0.3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        values(w, 0.3)


def test_a_backend_that_cannot_run_is_an_error_and_not_another_backend() -> None:
    w, C, _, _ = problem()

    def values(w: Tensor) -> list[Tensor]:
        return [bcjr(w, C, SPEC, temperature=0.3, backend="triton").values]

    for function in (values, compiled(values)):
        with pytest.raises(ValueError, match="CUDA"):
            function(w)


def test_a_second_derivative_is_refused() -> None:
    w, C, T, _ = problem()
    w = w.requires_grad_()
    (gradient,) = torch.autograd.grad(
        bcjr(w, C, SPEC, temperature=T).values.square().sum(), w, create_graph=True
    )
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(gradient.sum(), w)
    passed = pass_back(w.detach(), w, C, SPEC, temperature=T)
    (gradient,) = torch.autograd.grad(passed.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(gradient.sum(), w)


@pytest.mark.parametrize("learned", [False, True])
def test_the_codebooks_gradient_is_computed_only_where_it_is_needed(
    learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, C, T, _ = problem()
    asked: list[object] = []
    original = bcjr_torch.soft_backward

    def recorded(*arguments: object) -> object:
        asked.append(arguments[-1])
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(bcjr_torch, "soft_backward", recorded)
    w, C, T = w.requires_grad_(), C.requires_grad_(learned), T.requires_grad_()
    soft = bcjr(w, C, SPEC, temperature=T, return_entropy=True, backend="torch")
    assert soft.entropy is not None
    assert not soft.entropy.requires_grad
    soft.values.sum().backward()
    assert asked == [learned]
    assert w.grad is not None
    assert (C.grad is not None) == learned
    assert T.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "code", "spec"),
    [
        ("auto", "gaussian", SPEC),
        ("torch", "gaussian", SPEC),
        ("triton", "hyb", TrellisSpec(12, 2, 2)),
        ("cuda", "hyb", TrellisSpec(16, 2, 2)),
        ("cuda", "mul1", TrellisSpec(16, 2, 1)),
    ],
)
def test_a_cuda_graph_follows_its_inputs(backend: Backend, code: str, spec: TrellisSpec) -> None:
    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        w, g = torch.randn(2, 5, 16, spec.V, generator=generator, device="cuda")
        T = 0.05 + torch.rand(5, generator=generator, device="cuda")
        pins = torch.randint(spec.num_overlaps, (5,), generator=generator, device="cuda")
        return [w.clone(), g.clone(), T, pins]

    w, g, T, pins = fixed = inputs(0)
    C = codebook(code, spec).cuda()
    w.requires_grad_()

    def step() -> list[Tensor]:
        soft = bcjr(w, C, spec, temperature=T, ends=pins, backend=backend)
        (gradient,) = torch.autograd.grad(soft.values, w, g)
        hot = bcjr(w.detach(), C, spec, temperature=0.3, backend=backend)
        path = viterbi(w, C, spec, backend=backend)
        passed = pass_back(w.detach(), w, C, spec, temperature=T, ends=pins, backend=backend)
        (alone,) = torch.autograd.grad(passed, w, g)
        found = [soft.values.detach(), soft.log_z.detach(), gradient, alone]
        return [*found, hot.values, path.values]

    replay = capture(step)
    for seed in (1, 2):
        with torch.no_grad():
            for old, new in zip(fixed, inputs(seed), strict=True):
                old.copy_(new)
        for one, other in zip(replay(), step(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
