"""The training layer and the inference layer agree."""

from __future__ import annotations

import pytest
import torch
from cuda_graph import capture
from torch import Tensor

from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.modules.replace import share_codebooks_
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.recipes.group import quantize_linear
from softtrellis.spec import TrellisSpec

CODES = {
    "qtip": LayerFormat(40, 24, TrellisCode(TrellisSpec(8, 2, 2), "gaussian"), bias=True),
    "exl3": LayerFormat(
        130,
        100,
        TrellisCode(TrellisSpec(8, 2, 1), "mul1", normalize=False, order="exl3"),
        multiple=128,
        block=128,
        channel_scales=True,
    ),
}


def quantized(name: str) -> tuple[QuantizedLinear, torch.Tensor, torch.Tensor]:
    layer = CODES[name]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.out_features, layer.in_features, generator=generator) * 0.05
    x = torch.randn(200, layer.in_features, generator=generator)
    bias = torch.randn(layer.out_features, generator=generator) if layer.bias else None
    values = layer.code.codebook()
    module, report = quantize_linear(weight, x.T @ x / 200, layer, values, bias=bias)
    assert 0.0 < report.proxy_loss < 0.2
    assert 0.0 < report.error < 0.2
    return module, weight, x


@pytest.mark.parametrize("name", CODES)
def test_forward_is_the_decoded_weight(name: str) -> None:
    module, weight, x = quantized(name)
    expected = torch.nn.functional.linear(x, module.weight(), module.bias)
    assert torch.equal(module(x), expected)
    assert torch.equal(module.dequantize()(x), expected)
    with pytest.raises(ValueError, match="channels and must have"):
        module(x[..., :-1])
    assert float((module.weight() - weight).square().mean() / weight.square().mean()) < 0.2


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("estimator", ["soft", "straight_through", "mixed", "identity"])
def test_untouched_training_layer_hardens_to_the_same_bits(name: str, estimator: str) -> None:
    module, _, _ = quantized(name)
    latent = LatentLinear.from_quantized(module, estimator=estimator)  # type: ignore[arg-type]
    hard = latent.harden()
    for key, buffer in module.state_dict().items():
        assert torch.equal(hard.state_dict()[key], buffer), key
    assert torch.equal(hard.weight(), module.weight())


@pytest.mark.parametrize("name", CODES)
def test_cold_training_layer_is_its_hardened_layer(name: str) -> None:
    module, _, x = quantized(name)
    latent = LatentLinear.from_quantized(module)
    with torch.no_grad():
        noise = torch.randn(latent.latent.shape, generator=torch.Generator().manual_seed(1))
        latent.latent.add_(0.3 * noise)
    latent.reencode()
    latent.temperature = 0.006 / latent.variance
    hard = latent.harden()
    assert not torch.equal(hard.codes, module.codes)
    assert float(((latent(x) - hard(x)).norm() / hard(x).norm()).detach()) < 0.02
    latent.estimator = "identity"
    torch.testing.assert_close(latent(x), hard(x), rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_latent_weights() -> None:
    module, _, x = quantized("qtip")
    latent = LatentLinear.from_quantized(module, temperature=0.3)
    latent(x).square().sum().backward()
    assert latent.latent.grad is not None
    assert bool(torch.isfinite(latent.latent.grad).all())
    assert float(latent.latent.grad.norm()) > 0


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("estimator", ["soft", "straight_through", "mixed", "identity"])
def test_compiled_training_layer_follows_the_temperature(name: str, estimator: str) -> None:
    module, _, x = quantized(name)
    latent = LatentLinear.from_quantized(module, estimator=estimator)  # type: ignore[arg-type]
    torch.compiler.reset()
    compiled = torch.compile(latent, fullgraph=True, backend="aot_eager")
    for temperature in (0.3, *(torch.tensor(0.5 / n) for n in range(2, 12))):
        latent.temperature = temperature
        results = []
        for layer in (compiled, latent):
            y = layer(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), latent.latent)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CODES)
def test_training_layer_in_a_cuda_graph(name: str) -> None:
    module, _, x = quantized(name)
    temperature = torch.tensor(0.3, device="cuda")
    latent = LatentLinear.from_quantized(
        module.cuda(), estimator="straight_through", temperature=temperature
    )
    x = x.cuda()

    def step() -> list[Tensor]:
        y = latent(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), latent.latent)]

    replay = capture(step)
    for change in (0.1, 0.2):
        temperature.fill_(change)
        with torch.no_grad():
            latent.latent.add_(change * torch.randn_like(latent.latent))
        for one, other in zip(replay(), step(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_codes_are_exactly_k_bits_and_scales_are_few() -> None:
    layer = LayerFormat(192, 576, TrellisCode(TrellisSpec(8, 2, 2), "gaussian"))
    bits = QuantizedLinear(layer, layer.code.codebook()).stored_bits()
    assert bits["codes"] == 2 * 192 * 576
    assert bits["scales"] == 192 + 576 + 32
    padded = LayerFormat(172, 64, layer.code)
    assert QuantizedLinear(padded, layer.code.codebook()).stored_bits()["codes"] == 2 * 176 * 64


def test_weights_that_cannot_be_quantized() -> None:
    layer = CODES["qtip"]
    values = layer.code.codebook()
    weight = torch.zeros(24, 40)
    with pytest.raises(ValueError, match="zero everywhere"):
        quantize_linear(weight, None, layer, values)
    weight[3, 4] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_linear(weight, None, layer, values)


def test_layers_that_move_keep_one_codebook() -> None:
    layer = CODES["qtip"]
    values = layer.code.codebook()
    both = torch.nn.Sequential(*(QuantizedLinear(layer, values) for _ in range(2)))

    def shared() -> bool:
        first, second = both
        assert isinstance(first, QuantizedLinear)
        assert isinstance(second, QuantizedLinear)
        return first.codebook is second.codebook and first.table is second.table

    share_codebooks_(both)
    both.to("meta")
    assert shared()
    both[0].to_empty(device="cpu")  # one goes and comes back, the other stays
    assert not shared()
    both[0].to("meta")
    assert shared()
    both.double()
    assert shared()
    assert both[0].codebook.dtype == torch.float32


def test_a_code_of_the_same_codewords_has_not_changed() -> None:
    code = TrellisCode(TrellisSpec(16, 2, 2), "hyb")
    layer, values = LayerFormat(16, 16, code), code.codebook()
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    module, _ = quantize_linear(weight, torch.eye(16), layer, values)
    latent = LatentLinear.from_quantized(module)
    mirrored = 0xFFFF - latent.start
    assert not torch.equal(mirrored, latent.start)
    assert not latent.changed(mirrored).any()
    assert latent.changed(latent.start.roll(1, 1)).any()
