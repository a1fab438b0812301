"""BCJR's part of the gradients of hard codes, in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softtrellis.modules.latent_linear import LatentLinear, hold, release
from softtrellis.modules.quantized_linear import LayerFormat
from softtrellis.quantizers.basis import WeightBasis
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.quantizers.soft import Estimator
from softtrellis.recipes.bcjr_turns import BcjrTurns
from softtrellis.spec import TrellisSpec

CODE = TrellisCode(TrellisSpec(8, 2, 1), "gaussian")
TEMPERATURE, MIX = 0.3, 0.25
SHAPES = [(32, 16), (16, 32), (32, 16)]


@pytest.fixture
def layers() -> dict[str, LatentLinear]:
    generator, codebook = torch.Generator().manual_seed(0), CODE.codebook()
    found: dict[str, LatentLinear] = {}
    for number, (rows, columns) in enumerate(SHAPES):
        format_ = LayerFormat(columns, rows, CODE)
        weight = torch.randn(rows, columns, generator=generator)
        signs = format_.random_incoherence(number)
        basis = WeightBasis.fit(weight, signs, sigma=CODE.sigma(codebook), channel_scales=False)
        states = CODE.encode(basis.to_latent(weight), codebook)
        layer = LatentLinear(format_, codebook, basis, states, None)
        with torch.no_grad():
            layer.latent.add_(0.2 * torch.randn(layer.latent.shape, generator=generator))
        layer.temperature = TEMPERATURE
        found[f"{number}.proj"] = layer
    return found


def gradients(
    layers: dict[str, LatentLinear], seed: int, estimator: Estimator | None = None
) -> dict[str, Tensor]:
    """Of the latents, for a loss with random slopes; by an estimator, or the one they have."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.estimator, layer.mix = estimator or layer.estimator, MIX
        layer.latent.grad = None
    hold(layers.values())
    for layer in layers.values():
        assert layer.held is not None
        layer.held.grad = torch.randn(layer.held.shape, generator=generator)
    release(layers.values())
    return {name: gradient_of(layer) for name, layer in layers.items()}


def gradient_of(layer: LatentLinear) -> Tensor:
    assert layer.latent.grad is not None
    return layer.latent.grad.clone()


@pytest.mark.parametrize(("estimator", "mix"), [("mixed", MIX), ("straight_through", 1.0)])
def test_gradients_are_means_of_the_identity_s_and_bcjr_s_last_part(
    layers: dict[str, LatentLinear], estimator: Estimator, mix: float
) -> None:
    own = [gradients(layers, seed, "identity") for seed in range(5)]
    bcjr = [gradients(layers, seed, "straight_through") for seed in range(5)]
    turns = BcjrTurns(layers, 2, MIX)
    turns.train_by(estimator)
    # Layers 0 and 2 have the even steps, layer 1 the odd ones, and all the first.
    since = [[[0], [0]], [[0], [1]], [[1, 2], [1]], [[1, 2], [2, 3]], [[3, 4], [2, 3]]]
    for step in range(5):
        gradients(layers, step)
        turns.mix_(step)
        for number, (name, layer) in enumerate(layers.items()):
            steps = since[step][number % 2]
            part = torch.stack([bcjr[i][name] for i in steps]).mean(0)
            expected = (1 - mix) * own[step][name] + mix * part
            torch.testing.assert_close(gradient_of(layer), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["soft", "identity"])
def test_other_estimators_have_their_own_gradients(
    layers: dict[str, LatentLinear], estimator: Estimator
) -> None:
    expected = gradients(layers, 0, estimator)
    turns = BcjrTurns(layers, 4, MIX)
    turns.train_by(estimator)
    gradients(layers, 0)
    turns.mix_(0)
    assert all(torch.equal(gradient_of(layers[name]), expected[name]) for name in layers)
    assert not turns.state()


def test_with_a_stride_of_one_layers_have_the_estimator(layers: dict[str, LatentLinear]) -> None:
    turns = BcjrTurns(layers, 1, MIX)
    turns.train_by("mixed")
    assert {layer.estimator for layer in layers.values()} == {"mixed"}
    expected = gradients(layers, 0)
    turns.mix_(0)
    assert all(torch.equal(gradient_of(layers[name]), expected[name]) for name in layers)


def test_layers_without_a_gradient_wait(layers: dict[str, LatentLinear]) -> None:
    turns, absent = BcjrTurns(layers, 2, MIX), layers["1.proj"]
    turns.train_by("mixed")
    gradients(layers, 0)
    absent.latent.grad = None
    turns.mix_(0)
    assert absent.latent.grad is None
    expected = gradients(layers, 1, "straight_through")["1.proj"]
    own = gradients(layers, 1, "identity")["1.proj"]
    turns.mix_(2)  # not its turn, but its first gradient
    expected = (1 - MIX) * own + MIX * expected
    torch.testing.assert_close(gradient_of(absent), expected, rtol=1e-4, atol=1e-5)


def test_what_was_saved_goes_on(layers: dict[str, LatentLinear]) -> None:
    whole, first = BcjrTurns(layers, 2, MIX), BcjrTurns(layers, 2, MIX)
    for turns in (whole, first):
        turns.train_by("mixed")
        for step in range(2):
            gradients(layers, step)
            turns.mix_(step)
    rest = BcjrTurns(layers, 2, MIX)
    rest.train_by("mixed")
    rest.restore({name: tensor.clone() for name, tensor in first.state().items()})
    found = []
    for turns in (whole, rest):
        for step in range(2, 4):
            gradients(layers, step)
            turns.mix_(step)
        found.append({name: gradient_of(layer) for name, layer in layers.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in layers)
