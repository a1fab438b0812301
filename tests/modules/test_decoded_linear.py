"""Layers that decode their weight when they need it: gradients, held weights, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from softtrellis.modules.decoded_linear import decoded_linear
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TrellisSpec

CODE = TrellisCode(TrellisSpec(8, 2, 2), "gaussian")


@pytest.fixture
def layer() -> QuantizedLinear:
    """[24, 48] with bias and channel scales; any bits are a path."""
    shape = LayerFormat(48, 24, CODE, channel_scales=True, in_scales=True, bias=True)
    module = QuantizedLinear(shape, CODE.codebook())
    generator = torch.Generator().manual_seed(0)
    module.codes.random_(-(2**15), 2**15, generator=generator)
    module.out_signs.random_(0, 256, generator=generator)
    module.scale.fill_(0.37)
    assert module.out_scale is not None
    assert module.bias is not None
    module.out_scale.uniform_(0.5, 2.0, generator=generator)
    module.bias.normal_(generator=generator)
    return module


def test_gradients() -> None:
    weight = torch.randn(3, 5, dtype=torch.float64)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: decoded_linear(x, lambda: weight, b), (x, bias))
    assert torch.autograd.gradcheck(lambda x: decoded_linear(x, lambda: weight, None), (x[0, 0],))


@pytest.mark.parametrize("trains", [False, True])
def test_an_unknown_backend(layer: QuantizedLinear, trains: bool) -> None:
    layer.backend = "trition"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="unknown backend 'trition'"):
        layer(torch.randn(3, 48, requires_grad=trains))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layer_is_the_linear_layer_of_its_weight(
    layer: QuantizedLinear, x_dtype: torch.dtype
) -> None:
    layer.to(x_dtype)
    inputs = torch.randn(2, 3, 48).to(x_dtype)
    a, b = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    found = layer(a)
    expected = functional.linear(b, layer.weight().to(x_dtype), layer.bias)
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream)
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        assert torch.equal(layer(inputs), expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_compiled_without_a_break(layer: QuantizedLinear, gradients: bool) -> None:
    x = torch.randn(2, 48, requires_grad=gradients)
    torch.compiler.reset()
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    expected = layer(x)
    torch.testing.assert_close(found, expected)
    if gradients:
        ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (found, expected))
        torch.testing.assert_close(ours, theirs)


def test_under_autocast(layer: QuantizedLinear) -> None:
    x = torch.randn(4, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, layer.weight().sum(0).expand(4, -1), rtol=0.05, atol=0.05)


def test_a_held_weight_is_used_until_it_is_released(
    layer: QuantizedLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 48)
    expected, keys = layer(x), set(layer.state_dict())
    layer.hold()
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedLinear, "weight", None)
        assert torch.equal(layer(x), expected)
    assert set(layer.state_dict()) == keys
    layer.to(torch.bfloat16)
    assert layer.held_weight is not None
    assert layer.held_weight.dtype == torch.bfloat16
    layer.release()
    assert layer.held_weight is None


@pytest.mark.parametrize("change", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_change_of_dtype_leaves_the_weight(layer: QuantizedLinear, change: torch.dtype) -> None:
    before, dtypes = layer.weight(), {n: b.dtype for n, b in layer.named_buffers()}
    layer.to(change)
    assert torch.equal(layer.weight(), before)
    after = {name: buffer.dtype for name, buffer in layer.named_buffers()}
    assert after == dtypes | {"bias": change}
