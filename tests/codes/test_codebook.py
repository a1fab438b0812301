"""Codes against the published constants."""

from __future__ import annotations

import struct

import pytest
import torch

from softtrellis.codes.codebook import codebook
from softtrellis.codes.hybrid import default_table, trained_table
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.viterbi import viterbi

V1, V2 = TrellisSpec(16, 2, 1), TrellisSpec(16, 2, 2)


def half(bits: int) -> float:
    return float(struct.unpack("<e", struct.pack("<H", bits))[0])


def to_half(value: float) -> float:
    return float(struct.unpack("<e", struct.pack("<e", value))[0])


def masked_halves(h: int) -> float:
    m = (h & 0x8FFF8FFF) ^ 0x3B603B60
    return to_half(half(m >> 16) + half(m & 0xFFFF))


def scalar(name: str, x: int) -> float:
    """The definitions, one state at a time in Python's own arithmetic."""
    if name == "1mad":
        h = (34038481 * x + 76625530) % 2**32
        return (sum(h.to_bytes(4, "little")) - 510) / 147.800537109375
    if name == "3inst":
        return masked_halves((89226354 * x + 64248484) % 2**32)
    if name == "mcg":
        return masked_halves(0xCBAC1FED * x % 2**32)
    total = sum((0x83DCD12D * x % 2**32).to_bytes(4, "little"))
    return to_half(half(0x6400 + total) * half(0x1EEE) + half(0xC931))


@pytest.mark.parametrize("name", ["1mad", "3inst", "mcg", "mul1"])
def test_computed_codes_are_bit_exact(name: str) -> None:
    values = codebook(name, V1, normalize=False)
    expected = torch.tensor([scalar(name, x) for x in range(1 << 16)], dtype=torch.float64)
    assert torch.equal(values[:, 0], expected.to(torch.float32))


@pytest.mark.parametrize(("name", "rms"), [("3inst", 1.2437), ("mcg", 1.2441), ("mul1", 1.0003)])
def test_published_rms(name: str, rms: float) -> None:
    values = codebook(name, V1, normalize=False)
    assert abs(float(values.square().mean().sqrt()) - rms) < 5e-5


def test_mul1_has_913_values() -> None:
    assert codebook("mul1", V1, normalize=False).unique().numel() == 913


@pytest.mark.parametrize("flip", ["first", "second"])
def test_hybrid_looks_up_and_flips(flip: str) -> None:
    table = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    values = codebook("hyb", V2, table=table, flip=flip, normalize=False)  # type: ignore[arg-type]
    for x in (0, 1, 77, 4096, 65535):
        h = x * x + x
        row = table[(h >> 6) & 511].clone()
        if (h >> 15) & 1:
            row[0 if flip == "first" else 1] *= -1
        assert torch.equal(values[x], row)
    assert values.unique(dim=0).shape[0] == 1024


def test_hybrid_table_is_reproducible_and_gradients_reach_it() -> None:
    assert torch.equal(default_table(0, "second"), default_table(0, "second"))
    assert not torch.equal(default_table(0, "second"), default_table(1, "second"))
    assert torch.equal(default_table(0, "first"), default_table(0, "second").flip(1))
    apart = default_table(0, "second") - torch.from_numpy(trained_table(0))
    assert float(apart.abs().median()) < 1e-5, "hyb_table.npy is not what trained_table gives"
    table = default_table(0, "second").requires_grad_()
    codebook("hyb", V2, table=table).sum().backward()  # type: ignore[no-untyped-call]
    assert table.grad is not None
    assert bool(table.grad.any())


@pytest.mark.parametrize("name", ["1mad", "3inst", "mul1", "mcg", "hyb", "gaussian"])
@pytest.mark.parametrize("L", [10, 12, 16])
def test_normalized_rms_is_one(name: str, L: int) -> None:
    values = codebook(name, TrellisSpec(L, 2, 2 if name == "hyb" else 1))
    assert values.dtype == torch.float32
    assert float(values.square().mean().sqrt()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("name", "published"), [("1mad", 0.069), ("3inst", 0.069), ("hyb", 0.071)])
def test_error_on_gaussian_weights_at_two_bits(name: str, published: float) -> None:
    """Within 3% of QTIP's table 1: tail-biting, L = 16, tiles of 256 weights."""
    spec = V2 if name == "hyb" else V1
    w = torch.randn(96, spec.steps(), spec.V, generator=torch.Generator().manual_seed(0))
    path = viterbi(w, codebook(name, spec), spec, ends="tail_biting")
    error = float(path.cost.sum()) / w.numel()
    assert error == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2mad", V1), "unknown code"),
        (("1mad", V2), "V=1"),
        (("hyb", V1), "V=2"),
        (("hyb", TrellisSpec(9, 2, 2)), "at least 10"),
    ],
)
def test_codes_that_do_not_exist(arguments: tuple[str, TrellisSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codebook(*arguments)


def test_tables_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="table must be"):
        codebook("hyb", V2, table=torch.zeros(256, 2))
    with pytest.raises(ValueError, match="no table"):
        codebook("1mad", V1, table=torch.zeros(512, 2))
    with pytest.raises(ValueError, match="flip"):
        codebook("hyb", V2, flip="third")  # type: ignore[arg-type]
