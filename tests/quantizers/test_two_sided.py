"""LDLQ along inputs and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softtrellis.quantizers.basis import WeightBasis
from softtrellis.quantizers.ldlq import BLOCK, Tiles, block_ldl, ldlq, two_sided_ldlq
from softtrellis.transforms.incoherence import Incoherence

SHAPES = [(48, 80), (80, 48), (16, 64), (64, 16), (16, 16)]


def coarse(x: Tensor) -> Tensor:
    """Four values, 2 bits."""
    return (x * 1.3 - 0.5).round().clamp(-2, 1) / 1.3 + 0.5 / 1.3


def moment(n: int, seed: int) -> Tensor:
    a = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ torch.diag(torch.linspace(0.1, 3.0, n, dtype=torch.float64)) @ a.T / n


def weights(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def quantized(matrices: list[Tensor], inputs: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    found = [torch.full_like(matrix, torch.nan) for matrix in matrices]

    def encode(targets: Tensor, tiles: Tiles) -> Tensor:
        values = coarse(targets)
        parts = values.split([BLOCK * len(i) for i, _ in tiles])
        for result, (rows, columns), part in zip(found, tiles, parts, strict=True):
            blocks = result.reshape(len(result) // BLOCK, BLOCK, -1, BLOCK)
            for i, j, tile in zip(rows, columns, part.reshape(-1, BLOCK, BLOCK), strict=True):
                assert bool(blocks[i, :, j].isnan().all())  # each is asked for once
                blocks[i, :, j] = tile
        return values

    sides = [block_ldl(g, 0.01) for g in outputs]
    two_sided_ldlq(matrices, block_ldl(inputs, 0.01), sides, encode)
    return found


def loss(error: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    return float((outputs @ error @ inputs * error).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_each_tile_takes_what_the_formula_asks_for(shape: tuple[int, int]) -> None:
    (w,), h, g = weights(shape), moment(shape[1], 1), moment(shape[0], 2)
    lower, left = block_ldl(h, 0.01).factor, block_ldl(g, 0.01).factor
    expected, error = torch.zeros_like(w), torch.zeros_like(w)
    for i in reversed(range(0, shape[0], BLOCK)):
        for j in reversed(range(0, shape[1], BLOCK)):
            here = slice(i, i + BLOCK), slice(j, j + BLOCK)
            expected[here] = coarse(w[here] + (left.T @ error @ lower)[here])
            error[here] = w[here] - expected[here]
    assert torch.equal(quantized([w], h, [g])[0], expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_worth_of_outputs_it_is_ldlq(shape: tuple[int, int]) -> None:
    (w,), h = weights(shape), moment(shape[1], 1)
    one = torch.eye(shape[0], dtype=torch.float64)
    found = quantized([w], h, [one])[0]
    assert torch.equal(found, ldlq(w, block_ldl(h, 0.01), coarse))


def test_matrices_together_are_what_they_are_alone() -> None:
    matrices, h = weights((48, 64), (16, 64), (96, 64)), moment(64, 1)
    outputs = [moment(len(w), 2 + i) for i, w in enumerate(matrices)]
    together = quantized(matrices, h, outputs)
    for w, g, found in zip(matrices, outputs, together, strict=True):
        assert torch.equal(quantized([w], h, [g])[0], found)


def test_the_loss_in_both_hessians_falls() -> None:
    (w,), h, g = weights((96, 128)), moment(128, 1), moment(96, 2)
    plain, one_sided = coarse(w), ldlq(w, block_ldl(h, 0.01), coarse)
    both = quantized([w], h, [g])[0]
    losses = [loss(w - found, h, g) for found in (plain, one_sided, both)]
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] < 0.8 * losses[1]


@pytest.mark.parametrize("channel_scales", [False, True])
def test_the_loss_is_the_same_in_the_rotated_basis(channel_scales: bool) -> None:
    inputs, outputs = 44, 36
    (w,) = weights((outputs, inputs))
    h, g = moment(inputs, 1), moment(outputs, 2)
    basis = WeightBasis.fit(
        w.float(),
        Incoherence.random(inputs, outputs, seed=3),
        sigma=1.0,
        channel_scales=channel_scales,
    )
    latent = basis.to_latent(w)
    error = 0.1 * torch.randn_like(latent)
    change = w - basis.to_weight(latent - error)
    clean = basis.to_latent(w - change)  # what the padding's errors are not part of
    found = loss(latent - clean, basis.rotate_hessian(h), basis.rotate_output_hessian(g))
    assert found * float(basis.scale) ** 2 == pytest.approx(loss(change, h, g), rel=1e-5)
