"""The torch backend in float64 against enumeration and closed forms."""

from __future__ import annotations

import pytest
import torch
from oracle import admitted, all_paths, boltzmann, energies

from softtrellis.codes.codebook import codebook
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bcjr import bcjr
from softtrellis.trellis.reference import log_weights
from softtrellis.trellis.viterbi import viterbi

TINY = [(TrellisSpec(L=4, k=2, V=1), 5), (TrellisSpec(L=4, k=1, V=2), 5), (TrellisSpec(4, 3, 1), 3)]
TINY_IDS = ["L4k2V1N5", "L4k1V2N5", "L4k3V1N3"]


def problem(spec: TrellisSpec, steps: int, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(steps)
    w = torch.randn(batch, steps, spec.V, generator=generator, dtype=torch.float64)
    return w, codebook("gaussian", spec, seed=1).double()


@pytest.mark.parametrize(("spec", "steps"), TINY, ids=TINY_IDS)
@pytest.mark.parametrize("ends", ["free", "tail_biting", 1])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 20.0])
def test_bcjr_is_the_average_over_all_paths(
    spec: TrellisSpec, steps: int, ends: str | int, temperature: float
) -> None:
    w, C = problem(spec, steps)
    paths = admitted(all_paths(spec, steps), spec, ends)
    given = torch.full((3,), ends) if isinstance(ends, int) else ends
    soft = bcjr(w, C, spec, temperature=temperature, ends=given, return_entropy=True)
    assert soft.entropy is not None
    for tile in range(3):
        values, log_z, entropy = boltzmann(paths, w[tile], C, temperature)
        torch.testing.assert_close(soft.values[tile], values, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(soft.log_z[tile], log_z, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(soft.entropy[tile], entropy, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("spec", "steps"), TINY, ids=TINY_IDS)
@pytest.mark.parametrize("ends", ["free", "tail_biting_exact", 2])
def test_viterbi_is_the_least_of_all_paths(spec: TrellisSpec, steps: int, ends: str | int) -> None:
    if isinstance(ends, int) and ends >= spec.num_overlaps:
        ends = spec.num_overlaps - 1
    w, C = problem(spec, steps)
    name = "tail_biting" if ends == "tail_biting_exact" else ends
    paths = admitted(all_paths(spec, steps), spec, name)
    given = torch.full((3,), ends) if isinstance(ends, int) else ends
    found = viterbi(w, C, spec, ends=given)
    for tile in range(3):
        energy = energies(paths, w[tile], C)
        torch.testing.assert_close(found.cost[tile], energy.min())
        assert torch.equal(found.states[tile].long(), paths[energy.argmin()])
        assert torch.equal(found.values[tile], C[found.states[tile].long()])


def test_tail_biting_in_two_passes_closes_and_is_no_better_than_exact() -> None:
    spec = TrellisSpec(L=8, k=2, V=1)
    w, C = problem(spec, 40, batch=16)
    twice, exact = (viterbi(w, C, spec, ends=e) for e in ("tail_biting", "tail_biting_exact"))
    assert torch.equal(twice.states[:, 0] >> 2, twice.states[:, -1] % spec.num_overlaps)
    assert bool((twice.cost >= exact.cost - 1e-9).all())
    assert float(twice.cost.mean()) < 1.02 * float(exact.cost.mean())


@pytest.mark.parametrize("ends", ["free", "pinned", "tail_biting"])
@pytest.mark.parametrize("spec", [TrellisSpec(5, 2, 1), TrellisSpec(5, 1, 2)], ids=str)
def test_gradients_of_values_and_log_z(spec: TrellisSpec, ends: str) -> None:
    w, C = problem(spec, 3, batch=2)
    given = torch.tensor([1, 3]) if ends == "pinned" else ends
    temperature = torch.tensor([0.3, 0.8], dtype=torch.float64)

    def run(w: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        soft = bcjr(w, C, spec, temperature=temperature, ends=given)
        return soft.values, soft.log_z

    inputs = (w.requires_grad_(), C.requires_grad_())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=ends == "tail_biting")


def test_soft_codeword_is_w_plus_half_T_times_the_gradient_of_log_z() -> None:
    spec, T = TrellisSpec(L=6, k=2, V=1), 0.4
    w, C = problem(spec, 12)
    w.requires_grad_()
    soft = bcjr(w, C, spec, temperature=T)
    (gradient,) = torch.autograd.grad(soft.log_z.sum(), w)
    torch.testing.assert_close(soft.values, w + T / 2 * gradient, rtol=1e-10, atol=1e-10)


def test_jacobian_is_symmetric_positive_semidefinite() -> None:
    spec = TrellisSpec(L=5, k=2, V=1)
    w, C = problem(spec, 6, batch=1)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: bcjr(x, C, spec, temperature=0.5).values, w
    ).reshape(6, 6)
    torch.testing.assert_close(jacobian, jacobian.T, rtol=1e-9, atol=1e-12)
    assert float(torch.linalg.eigvalsh(jacobian).min()) > -1e-12


def test_log_z_is_the_logarithm_of_the_transfer_matrix_product() -> None:
    spec, T = TrellisSpec(L=6, k=1, V=2), 0.9
    w, C = problem(spec, 7, batch=1)
    states = torch.arange(spec.num_states)
    follows = (states[:, None] % spec.num_overlaps == states[None, :] >> spec.shift).double()
    phi = [
        log_weights(w[:, t], C, torch.tensor([T], dtype=torch.float64))[0].exp() for t in range(7)
    ]
    vector, closed = phi[0], torch.diag(phi[0])
    for factor in phi[1:]:
        vector = (vector @ follows) * factor
        closed = (closed @ follows) * factor
    torch.testing.assert_close(bcjr(w, C, spec, temperature=T).log_z[0], vector.sum().log())
    torch.testing.assert_close(
        bcjr(w, C, spec, temperature=T, ends="tail_biting").log_z[0],
        (closed @ follows).diagonal().sum().log(),
    )


@pytest.mark.parametrize("ends", ["free", "pinned"])
def test_limits_of_the_temperature(ends: str) -> None:
    spec = TrellisSpec(L=8, k=2, V=2)
    w, C = problem(spec, 16, batch=4)
    pins = torch.tensor([0, 3, 7, 15])
    given = pins if ends == "pinned" else ends
    cold = bcjr(w, C, spec, temperature=1e-4, ends=given)
    hard = viterbi(w, C, spec, ends=given)
    torch.testing.assert_close(cold.values, hard.values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(-1e-4 * cold.log_z, hard.cost, rtol=1e-5, atol=1e-5)
    hot = bcjr(w, C, spec, temperature=1e9, ends=given).values
    inner = (
        slice(spec.min_closed_steps, -spec.min_closed_steps) if ends == "pinned" else slice(None)
    )
    mean = C.mean(0).expand_as(hot)
    torch.testing.assert_close(hot[:, inner], mean[:, inner], rtol=1e-6, atol=1e-6)


def test_any_valid_path_re_encodes_without_loss() -> None:
    spec = TrellisSpec(L=10, k=2, V=1)
    C = codebook("gaussian", spec, seed=3)
    symbols = torch.randint(spec.num_branches, (5, 64), generator=torch.Generator().manual_seed(0))
    states = torch.zeros(5, 64, dtype=torch.int64)
    for offset in range(spec.L // 2):
        states = (states << 2) | symbols.roll(-offset, dims=1)
    found = viterbi(C[states].double(), C.double(), spec, ends="tail_biting")
    assert float(found.cost.max()) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(2, 8, 2)}, "w must be"),
        ({"w": torch.zeros(2, 8, 1, dtype=torch.float16)}, "float32 or float64"),
        ({"w": torch.full((2, 8, 1), torch.nan)}, "NaN or infinity"),
        ({"codebook": torch.zeros(16, 1)}, "codebook must be"),
        ({"temperature": 0.0}, "positive"),
        ({"temperature": -1.0}, "positive"),
        ({"temperature": float("nan")}, "positive and finite"),
        ({"temperature": 1e-4}, "this backend takes temperatures"),
        ({"temperature": torch.ones(3)}, "temperature must be"),
        ({"ends": "round"}, "unknown ends"),
        ({"ends": torch.tensor([0, 64])}, "must lie in"),
        ({"ends": torch.tensor([0])}, "ends must be"),
        ({"w": torch.zeros(2, 1, 1), "ends": torch.tensor([0, 0])}, "no path closes"),
        ({"backend": "fortran"}, "unknown backend"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    spec = TrellisSpec(L=8, k=2, V=1)
    given = {
        "w": torch.zeros(2, 8, 1),
        "codebook": codebook("gaussian", spec),
        "temperature": 0.3,
        "ends": "free",
    } | change
    with pytest.raises(ValueError, match=message):
        bcjr(given.pop("w"), given.pop("codebook"), spec, **given)  # type: ignore[arg-type]


def test_tail_biting_over_many_overlaps_suggests_pinning() -> None:
    spec = TrellisSpec(L=12, k=2, V=1)
    w, C = torch.zeros(1, 8, 1), codebook("1mad", spec)
    with pytest.raises(ValueError, match=r"path\.states\[:, 0\] >> \(k\*V\)"):
        bcjr(w, C, spec, temperature=1.0, ends="tail_biting")
    with pytest.raises(ValueError, match="tail_biting"):
        viterbi(w, C, spec, ends="tail_biting_exact")
