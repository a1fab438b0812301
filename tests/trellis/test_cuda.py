"""The CUDA C++ kernels against the float64 reference; without a GPU, that they compile."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch
from torch import Tensor

from softtrellis.codes.codebook import codebook
from softtrellis.codes.hybrid import table_rows
from softtrellis.spec import TrellisSpec
from softtrellis.trellis import viterbi_cuda
from softtrellis.trellis.bcjr import bcjr, pass_back
from softtrellis.trellis.bitshift import check_path
from softtrellis.trellis.codebook_cuda import scaled_halves, states_of_rows
from softtrellis.trellis.viterbi import viterbi

HYB, SCALAR, SHORT = TrellisSpec(16, 2, 2), TrellisSpec(16, 2, 1), TrellisSpec(12, 2, 2)
CODES = [
    ("hyb", HYB),
    ("hyb-first", HYB),
    ("gaussian", HYB),
    ("mul1", SCALAR),
    ("3inst", SCALAR),
    ("mcg", SCALAR),
    ("1mad", SCALAR),
    ("gaussian", SCALAR),
]
SHORT_CODES = [("hyb", SHORT), ("hyb-first", SHORT), ("gaussian", SHORT)]
SOURCES = (
    "bcjr_hyb.cu",
    "bcjr_scalar.cu",
    "bcjr_short.cu",
    "viterbi_hyb.cu",
    "viterbi_scalar.cu",
    "decode.cu",
    "rotation.cu",
    "rotation_blocks.cu",
    "rotation_columns.cu",
)


def table_of(code: str, spec: TrellisSpec) -> Tensor:
    if code == "hyb-first":
        return codebook("hyb", spec).flip(1).contiguous()
    return codebook(code, spec, seed=3)


def problem(
    code: str, spec: TrellisSpec, batch: int, steps: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights with outliers, the codebook, overlaps and an upstream gradient, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(batch, steps, spec.V, generator=generator)
    w[torch.rand(w.shape, generator=generator) < 0.01] *= 4
    g = torch.randn(w.shape, generator=generator)
    pins = torch.randint(spec.num_overlaps, (batch,), generator=generator)
    return w.cuda(), table_of(code, spec).cuda(), pins.cuda(), g.cuda()


def relative(found: Tensor, exact: Tensor) -> float:
    assert bool(torch.isfinite(found).all())
    return float((found.double() - exact).norm() / exact.norm())


ANSWERS = ("values", "log_z", "gradient", "gradient alone")


def answers(
    w: Tensor, C: Tensor, spec: TrellisSpec, T: Tensor, ends: object, g: Tensor, backend: str
) -> list[Tensor]:
    x = w.clone().requires_grad_()
    soft = bcjr(x, C, spec, temperature=T, ends=ends, backend=backend)  # type: ignore[arg-type]
    loss = (soft.values * g.to(w)).sum() + 0.1 * soft.log_z.sum()
    gradients = torch.autograd.grad(loss, x, retain_graph=True)
    hard = viterbi(w, C, spec, ends=ends, backend=backend).values  # type: ignore[arg-type]
    passed = pass_back(hard, x, C, spec, temperature=T, ends=ends, backend=backend)  # type: ignore[arg-type]
    alone = (passed * g.to(w)).sum() + 0.1 * soft.log_z.sum()  # which no path has to itself
    gradients += torch.autograd.grad(alone, x)
    return [soft.values.detach(), soft.log_z.detach(), *gradients]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_kernels_compile(source: str, capability: tuple[int, int]) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from softtrellis.trellis.launch_cuda import compile_source

    try:
        assert len(compile_source(source, *capability)) > 1000
    except RuntimeError as error:
        if "libnvrtc" in str(error):
            pytest.skip(f"no NVRTC library: {error}")
        raise


@pytest.mark.parametrize("flip", [False, True])
def test_hybrid_has_the_symmetries_that_the_kernels_use(flip: bool) -> None:
    C = table_of("hyb-first" if flip else "hyb", HYB)
    sign = torch.tensor([-1.0, 1.0] if flip else [1.0, -1.0])
    assert torch.equal(C, C.flip(0))
    assert torch.equal(C[1 << 15 :], C[: 1 << 15] * sign)
    states = states_of_rows(torch.device("cpu")).long()
    assert torch.equal(table_rows(states)[0], torch.arange(512))
    assert not bool((states & 0x8800).any())


@pytest.mark.parametrize("code", ["mul1", "3inst", "mcg", "1mad"])
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-3, 1e3])
def test_computed_codes_are_scaled_halves(code: str, scale: float) -> None:
    C = codebook(code, SCALAR) * scale
    halves, factor = scaled_halves(C)
    assert halves.dtype == torch.float16
    torch.testing.assert_close(halves.float() * factor, C.flatten(), rtol=3e-7, atol=0)


def test_other_codebooks_have_no_factor() -> None:
    assert float(scaled_halves(codebook("gaussian", SCALAR))[1]) == 0.0
    C = codebook("mul1", SCALAR)
    C[12345] += 1e-4
    assert float(scaled_halves(C)[1]) == 0.0


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
def test_viterbi_follows_a_codebook_that_changes() -> None:
    """What is known of a codebook holds for its values, not for the tensor."""
    w, C, _, _ = problem("hyb", HYB, 3, HYB.steps())
    other = codebook("gaussian", HYB, seed=3).cuda()
    symmetric = C.clone()
    for values in (C, other, C):
        symmetric.copy_(values)
        for _ in range(2):
            found = viterbi(w, symmetric, HYB, backend="cuda").states
            assert torch.equal(found, viterbi(w, values, HYB, backend="triton").states)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("ends", ["free", "pinned", "hard"])
@pytest.mark.parametrize(("code", "spec"), CODES + SHORT_CODES)
def test_bcjr_at_all_temperatures(code: str, spec: TrellisSpec, ends: str) -> None:
    temperatures = [100.0, 0.3, 0.05, 0.03, 0.02, 0.005]
    T = torch.tensor(temperatures).repeat_interleave(2).cuda()
    w, C, pins, g = problem(code, spec, len(T), spec.steps())
    if ends == "hard":
        pins = viterbi(w, C, spec).states[:, 0] >> spec.shift
    given = "free" if ends == "free" else pins
    found = answers(w, C, spec, T, given, g, "cuda")
    exact = answers(w.double(), C.double(), spec, T.double(), given, g, "torch")
    for name, x, y in zip(ANSWERS, found, exact, strict=True):
        for temperature in temperatures:
            mine = T.new_tensor(temperature) == T
            tolerance = 2e-5 if temperature >= 0.05 else 1e-4
            assert relative(x[mine], y[mine]) < tolerance, (name, temperature)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("code", "spec"), [CODES[0], CODES[2], CODES[3], CODES[7], *SHORT_CODES])
@pytest.mark.parametrize("steps", [7, 8, 37, 300])
def test_other_lengths(code: str, spec: TrellisSpec, steps: int) -> None:
    w, C, pins, g = problem(code, spec, 5, steps)
    T = torch.tensor([0.03, 0.05, 0.3, 2.0, 0.1], device="cuda")
    for ends in ("free", pins):
        found = answers(w, C, spec, T, ends, g, "cuda")
        exact = answers(w.double(), C.double(), spec, T.double(), ends, g, "torch")
        for name, x, y in zip(ANSWERS, found, exact, strict=True):
            assert relative(x, y) < 1e-4, name


@pytest.mark.gpu
@pytest.mark.parametrize(("code", "spec"), [("hyb", HYB), ("mul1", SCALAR), ("hyb", SHORT)])
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_upstream_gradients_of_any_size(code: str, spec: TrellisSpec, scale: float) -> None:
    w, C, _, g = problem(code, spec, 2, spec.steps())
    T = torch.full((2,), 0.05, device="cuda")
    one = w.clone().requires_grad_()
    unit, scaled = (
        torch.autograd.grad(bcjr(one, C, spec, temperature=T, backend="cuda").values, one, up)[0]
        for up in (g, g * scale)
    )
    assert relative(scaled / scale, unit.double()) < 5e-6
    soft = bcjr(one, C, spec, temperature=T, backend="cuda")
    none = torch.autograd.grad(soft.values, one, 0 * g)[0]
    assert not bool(none.any())


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("code", "spec"), CODES)
@pytest.mark.parametrize("ends", ["free", "pinned", "tail_biting"])
def test_viterbi(code: str, spec: TrellisSpec, ends: str) -> None:
    for batch, steps in ((1, spec.steps()), (7, 37), (5, 40), (300, 8), (3, 300)):
        w, C, pins, _ = problem(code, spec, batch, steps)
        given = pins if ends == "pinned" else ends
        found = viterbi(w, C, spec, ends=given, backend="cuda")
        other = viterbi(w, C, spec, ends=given, backend="triton")
        check_path(found.states, spec, tail_biting=ends != "free")
        torch.testing.assert_close(found.cost, other.cost, rtol=1e-6, atol=0)
        assert torch.equal(found.states, other.states)
    w, C, pins, _ = problem(code, spec, 2, spec.steps())
    given = pins if ends == "pinned" else ends
    found = viterbi(w, C, spec, ends=given, backend="cuda")
    best = viterbi(w.double(), C.double(), spec, ends=given, backend="torch")
    torch.testing.assert_close(found.cost.double(), best.cost, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("code", "spec"), [("hyb", HYB), ("mul1", SCALAR)])
def test_twenty_runs_agree(code: str, spec: TrellisSpec) -> None:
    w, C, pins, g = problem(code, spec, 601, spec.steps())
    T = torch.full((601,), 0.03, device="cuda")
    first = answers(w, C, spec, T, pins, g, "cuda")
    path = viterbi(w, C, spec, backend="cuda").states
    for _ in range(19):
        for x, y in zip(answers(w, C, spec, T, pins, g, "cuda"), first, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
        assert torch.equal(viterbi(w, C, spec, backend="cuda").states, path)


@pytest.mark.gpu
@pytest.mark.parametrize(("code", "spec"), [("hyb", HYB), ("mul1", SCALAR)])
def test_entropy_and_codebook_gradient(code: str, spec: TrellisSpec) -> None:
    w, C, _, g = problem(code, spec, 2, spec.steps())
    results = []
    for dtype, backend in ((torch.float32, "cuda"), (torch.float64, "torch")):
        table = C.to(dtype).requires_grad_()
        soft = bcjr(
            w.to(dtype),
            table,
            spec,
            temperature=0.05,
            return_entropy=True,
            backend=backend,  # type: ignore[arg-type]
        )
        assert soft.entropy is not None
        gradient = torch.autograd.grad((soft.values * g.to(dtype)).sum(), table)[0]
        results.append([soft.entropy, gradient])
    for x, y in zip(*results, strict=True):
        assert relative(x, y) < 2e-4


@pytest.mark.gpu
def test_float64_is_refused() -> None:
    w, C, _, _ = problem("hyb", HYB, 2, 128)
    with pytest.raises(ValueError, match="float32 tensors on a CUDA device"):
        bcjr(w.double(), C.double(), HYB, temperature=0.1, backend="cuda")


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("spec", [HYB, SCALAR])
def test_triton_takes_what_cuda_leaves(
    monkeypatch: pytest.MonkeyPatch, spec: TrellisSpec, capturing: bool
) -> None:
    """Which kernels are started, with stand-ins for them: no GPU is needed."""
    started: list[str] = []

    class Leaves:
        def __init__(self, everything: bool) -> None:
            self.everything = everything

        def __call__(
            self, blocks: int, shared: int, device: object, addresses: list[Tensor], *_: object
        ) -> None:
            started.append("cuda")
            addresses[-1].fill_(3 if self.everything else 0)

    def triton(w: Tensor, *_: object) -> Tensor:
        started.append("triton")
        return torch.zeros(w.shape[:2], dtype=torch.int32)

    monkeypatch.setattr(viterbi_cuda, "multiprocessors", lambda _: 4)
    monkeypatch.setattr(viterbi_cuda.viterbi_triton, "fill", triton)
    monkeypatch.setattr(viterbi_cuda.viterbi_triton, "best_path", triton)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    w, C = torch.randn(3, spec.steps(), spec.V), torch.randn(spec.num_states, spec.V)

    def starts(everything: bool) -> list[str]:
        for name in ("_FEW", "_MANY", "_SCALAR"):
            monkeypatch.setattr(viterbi_cuda, name, Leaves(everything))
        started.clear()
        viterbi_cuda.tail_biting_path(w, C, spec)
        return list(started)

    both = ["cuda", "triton", "triton"]
    assert starts(False) == (both if capturing else ["cuda"])
    assert starts(False) == (both if capturing else ["cuda"])
    C.mul_(2)  # other values, so that it has to be asked again
    assert starts(True) == both
    assert starts(True) == (both if capturing else both[1:])
    with torch.inference_mode():
        C = torch.randn(spec.num_states, spec.V)
        assert starts(False) == both


def test_lanes_of_the_short_kernel_never_conflict() -> None:
    """Its order of overlaps: every one once, eight lanes in different banks of the table."""
    source = (files("softtrellis.trellis") / "cuda" / "short.cuh").read_text()
    block = source.split("ORDER[32] = {")[1].split("}")[0]
    orders = torch.tensor([int(x, 16) for x in block.split(",")])
    lane = torch.arange(32)
    y = (lane & 7) << 1 | ((lane & 1) ^ lane >> 4)
    overlaps = 16 * y + (orders >> 4 * torch.arange(8)[:, None] & 15)
    assert torch.equal(overlaps.flatten().sort().values, torch.arange(256))
    for x in range(16):
        row, sign = table_rows(256 * x + overlaps)
        entries = (row + 512 * sign.long()).reshape(8, 4, 8)
        assert bool((entries.remainder(8).sort().values == torch.arange(8)).all())
