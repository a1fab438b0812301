"""LDLQ, its factorisation, and the scalar baseline."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softtrellis.codes.codebook import codebook
from softtrellis.codes.scalar import lloyd_max
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.quantizers.ldlq import BLOCK, block_ldl, ldlq, proxy_loss
from softtrellis.quantizers.scalar import round_to_nearest
from softtrellis.spec import TrellisSpec


def correlated(size: int) -> Tensor:
    """A Hessian with a steep spectrum."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.logspace(0, -3, size, dtype=torch.float64)
    return (basis * spectrum) @ basis.T


def test_factor_is_unit_block_lower_triangular_and_reproduces_the_hessian() -> None:
    hessian = correlated(64)
    factor = block_ldl(hessian, damping=1e-9).factor
    for i in range(0, 64, BLOCK):
        here = slice(i, i + BLOCK)
        torch.testing.assert_close(factor[here, here], torch.eye(BLOCK, dtype=factor.dtype))
        assert not bool(factor[here, i + BLOCK :].any())
    inner = torch.linalg.solve_triangular(factor, hessian, upper=False)
    middle = torch.linalg.solve_triangular(factor, inner.T, upper=False)
    off_block = middle.clone()
    for i in range(0, 64, BLOCK):
        off_block[i : i + BLOCK, i : i + BLOCK] = 0
    assert float(off_block.abs().max()) < 1e-8


def test_feedback_beats_rounding_without_it() -> None:
    hessian = correlated(64)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    levels = lloyd_max(2)

    def encode(columns: Tensor) -> Tensor:
        return round_to_nearest(columns, levels)

    with_feedback = ldlq(weight, block_ldl(hessian, 0.01), encode)
    without = encode(weight)
    assert proxy_loss(weight, with_feedback, hessian) < 0.7 * proxy_loss(weight, without, hessian)


def test_without_correlation_it_is_plain_rounding() -> None:
    weight = torch.randn(16, 48, dtype=torch.float64)
    levels = lloyd_max(2)
    found = ldlq(
        weight,
        block_ldl(torch.eye(48, dtype=torch.float64), 0.01),
        lambda columns: round_to_nearest(columns, levels),
    )
    assert torch.equal(found, round_to_nearest(weight, levels))


def test_trellis_under_feedback_beats_scalar_under_feedback() -> None:
    hessian = correlated(64).float()
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    code = TrellisCode(TrellisSpec(8, 2, 1), "gaussian")
    values = code.codebook()

    def encode(columns: Tensor) -> Tensor:
        return code.decode(code.encode(columns, values), values, *columns.shape)

    factor = block_ldl(hessian, 0.01)
    levels = lloyd_max(2)
    trellis = proxy_loss(weight, ldlq(weight, factor, encode), hessian)
    scalar = ldlq(weight, factor, lambda columns: round_to_nearest(columns, levels))
    assert trellis < proxy_loss(weight, scalar, hessian)


def test_dead_channels_and_rank_deficiency_are_survived() -> None:
    hessian = correlated(32)
    hessian[5], hessian[:, 5] = 0.0, 0.0
    assert bool(torch.isfinite(block_ldl(hessian, 0.01).factor).all())
    thin = torch.randn(4, 32, dtype=torch.float64)
    assert bool(torch.isfinite(block_ldl(thin.T @ thin, 1e-8).factor).all())


def test_damping_grows_until_the_factorisation_succeeds() -> None:
    hessian = torch.eye(16, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1.5
    assert block_ldl(hessian, 0.01).damping > 0.01


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.full((16, 16), torch.nan), "NaN or infinity"),
        (torch.zeros(16, 16), "never fire"),
        (torch.eye(20), "multiple of 16"),
    ],
)
def test_hessians_that_cannot_be_used(hessian: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_ldl(hessian, 0.01)


def test_lloyd_max_at_two_bits_has_the_published_error() -> None:
    w = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    error = float((round_to_nearest(w, lloyd_max(2)) - w).square().mean())
    assert error == pytest.approx(0.1175, rel=0.02)
    assert codebook("gaussian", TrellisSpec(8, 2, 1)).shape == (256, 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_scalar_code_is_rounding_to_the_nearest_level(bits: int) -> None:
    code = TrellisCode(TrellisSpec(8, bits, 1), "scalar")
    values = code.codebook()
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(bits))
    states = code.encode(w, values)
    found, expected = code.decode(states, values, 64, 64), round_to_nearest(w, lloyd_max(bits))
    torch.testing.assert_close((found - w).abs(), (expected - w).abs())  # ties round either way
    assert float((found != expected).double().mean()) < 1e-3
    assert code.sigma(values) == 1.0


def test_sigma_is_where_the_error_is_least() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for bits in range(1, 5):
        code = TrellisCode(TrellisSpec(10, bits, 1), "mul1")
        values = code.codebook()

        def error(sigma: float, code: TrellisCode = code, values: torch.Tensor = values) -> float:
            found = code.decode(code.encode(w * sigma, values), values, *w.shape) / sigma
            return float((found - w).square().mean())

        best = code.sigma(values)
        assert error(best) < min(error(best * 1.2), error(best / 1.2))
