"""Layers that are held together get what each of them computes alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from softtrellis.modules import latent_stacks
from softtrellis.modules.latent_linear import (
    LatentLinear,
    find_codes,
    hard_states,
    hold,
    reencode,
    release,
    searching,
)
from softtrellis.modules.latent_stacks import batches, stacks
from softtrellis.modules.quantized_linear import LayerFormat
from softtrellis.quantizers.basis import WeightBasis, to_weights
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.quantizers.soft import Estimator
from softtrellis.spec import TrellisSpec

TEMPERATURE = 0.3
QTIP = TrellisCode(TrellisSpec(8, 2, 2), "gaussian")
EXL3 = TrellisCode(TrellisSpec(8, 2, 1), "mul1", normalize=False, order="exl3")
CODEBOOKS = {code.name: code.codebook() for code in (QTIP, EXL3)}
SQUARE, PADDED = LayerFormat(64, 64, QTIP), LayerFormat(40, 24, QTIP)
BLOCKS = LayerFormat(130, 100, EXL3, multiple=128, block=128, channel_scales=True)
DECODER_LAYER = [SQUARE, PADDED, LayerFormat(24, 40, QTIP), LayerFormat(64, 172, QTIP), SQUARE]


def made(format_: LayerFormat, seed: int, estimator: Estimator, *, scales: bool) -> LatentLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(format_.out_features, format_.in_features, generator=generator) * 0.05
    codebook = CODEBOOKS[format_.code.name]
    basis = WeightBasis.fit(
        weight,
        format_.random_incoherence(seed),
        sigma=format_.code.sigma(codebook),
        channel_scales=format_.channel_scales,
    )
    states = format_.code.encode(basis.to_latent(weight), codebook)
    layer = LatentLinear(
        format_, codebook, basis, states, None, estimator=estimator, temperature=TEMPERATURE
    )
    moved = [layer.latent, *(layer.train_scales().values() if scales else ())]
    with torch.no_grad():
        for parameter in moved:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.fixture(params=["soft", "straight_through", "mixed", "identity"])
def estimator(request: pytest.FixtureRequest) -> Estimator:
    found: Estimator = request.param
    return found


@pytest.fixture(params=[False, True], ids=["latents", "scales"])
def layers(request: pytest.FixtureRequest, estimator: Estimator) -> list[LatentLinear]:
    formats = [*DECODER_LAYER, *DECODER_LAYER, BLOCKS, BLOCKS]
    return [made(f, seed, estimator, scales=request.param) for seed, f in enumerate(formats)]


@pytest.fixture(params=[1 << 17, 32, 1], ids=["whole", "cut", "single"])
def most_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(latent_stacks, "MOST_TILES", request.param)
    most: int = request.param
    return most


def gradients(layers: list[LatentLinear]) -> Iterator[Tensor]:
    for layer in layers:
        for parameter in layer.parameters():
            assert parameter.grad is not None
            yield parameter.grad
        layer.zero_grad()


def test_weights_and_gradients(layers: list[LatentLinear], most_tiles: int) -> None:
    generator = torch.Generator().manual_seed(0)
    upstream = [
        torch.randn(layer.layer.out_features, layer.layer.in_features, generator=generator)
        for layer in layers
    ]
    alone = [layer.weight() for layer in layers]
    torch.autograd.backward(alone, upstream)
    expected = list(gradients(layers))

    hold(layers)
    for layer, weight, gradient in zip(layers, alone, upstream, strict=True):
        assert layer.held is not None
        assert layer.held.is_leaf
        torch.testing.assert_close(layer.held.detach(), weight.detach())
        for share in (0.25, 0.75):  # two passes
            (layer.held * gradient).sum().mul(share).backward()
    release(layers)
    assert all(layer.held is None for layer in layers)
    for found, wanted in zip(gradients(layers), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_layers_that_no_pass_went_through(layers: list[LatentLinear]) -> None:
    used, unused = layers[0], layers[4]  # of one shape
    used.weight().square().sum().backward()
    expected = list(gradients([used]))
    hold(layers)
    assert used.held is not None
    used.held.square().sum().backward()
    release(layers)
    assert all(p.grad is None or not bool(p.grad.any()) for p in unused.parameters())
    for found, wanted in zip(gradients([used]), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_weights_without_gradients(layers: list[LatentLinear]) -> None:
    with torch.no_grad():
        hold(layers)
        for layer in layers:
            assert layer.held is not None
            assert not layer.held.requires_grad
            torch.testing.assert_close(layer.held, layer.weight())
        release(layers)


def test_hard_codes(layers: list[LatentLinear], most_tiles: int) -> None:
    found = list(hard_states(layers))
    assert len(found) == len(layers)
    assert {id(layer) for layer, _ in found} == set(map(id, layers))
    for layer, states in found:
        assert torch.equal(states, layer.hard_states())
    reencode(layers)
    pins = [layer.pins for layer in layers]
    for layer, together in zip(layers, pins, strict=True):
        layer.reencode()
        assert torch.equal(layer.pins, together)


def test_codes_are_kept_until_they_are_found_again(
    layers: list[LatentLinear], estimator: Estimator
) -> None:
    find_codes(layers)
    before = [layer.weight().detach() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.latent.add_(torch.randn_like(layer.latent))
    with searching(layers):
        new = [layer.weight().detach() for layer in layers]
    assert not any(torch.equal(a, b) for a, b in zip(before, new, strict=True))
    kept = before if estimator == "identity" else new
    hold(layers)
    for layer, weight in zip(layers, kept, strict=True):
        assert layer.held is not None
        torch.testing.assert_close(layer.held.detach(), weight)
        layer.held.sum().backward()
    release(layers)
    assert all(layer.latent.grad is not None for layer in layers)
    find_codes(layers)
    for layer, weight in zip(layers, new, strict=True):
        torch.testing.assert_close(layer.weight().detach(), weight)


def test_layers_of_one_shape_are_one_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [made(f, 0, "identity", scales=False) for f in [*DECODER_LAYER, *DECODER_LAYER]]

    def sizes() -> list[list[int]]:
        return [[len(stack) for stack in stacks(batch)] for batch in batches(layers)]

    assert sizes() == [[4, 2, 2, 2]]
    monkeypatch.setattr(latent_stacks, "MOST_TILES", 3 * SQUARE.tiles)
    assert sizes() == [[3], [1, 2, 2], [1], [1]]
    layers[4].train_scales()
    monkeypatch.undo()
    assert sizes() == [[3, 2, 2, 2, 1]]


def test_a_stack_has_scales_of_channels_for_all_or_none() -> None:
    layers = [made(SQUARE, seed, "identity", scales=seed == 1) for seed in (0, 1)]
    latents = torch.stack([layer.latent for layer in layers])
    with pytest.raises(ValueError, match="either all"):
        to_weights([layer.current_basis() for layer in layers], latents)
