"""Conv1D layers as plain linear layers."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_model, tokens
from torch import nn

from softtrellis.modules.unify import is_conv1d, unify_linears_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [True, False])
def test_the_linear_is_the_conv1d(dtype: torch.dtype, trains: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(24, 40).to(dtype).requires_grad_(trains).eval()
    with torch.no_grad():
        conv.bias.normal_()
    model = nn.ModuleDict({"a": conv, "b": Conv1D(3, 2)})
    unify_linears_(model, ["a", "c"])
    linear = model["a"]
    assert isinstance(linear, nn.Linear)
    assert is_conv1d(model["b"])
    assert (linear.in_features, linear.out_features) == (40, 24)
    assert linear.weight.dtype == linear.bias.dtype == dtype
    assert linear.weight.requires_grad == linear.bias.requires_grad == trains
    assert not linear.training
    assert linear.weight.is_contiguous()
    x = torch.randn(2, 5, 40, dtype=dtype)
    torch.testing.assert_close(linear(x), conv(x))
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
    assert bool(linear.weight.any())
    assert bool(linear.bias.any())


def test_only_the_named_layers_of_a_model_are_exchanged() -> None:
    model = tiny_model("gpt2")
    expected = model(tokens()).logits
    name = "transformer.h.1.mlp.c_fc"
    unify_linears_(model, [name, "transformer.wte", "transformer.h.7.mlp.c_fc"])
    linears = [
        n for n, module in model.transformer.h.named_modules() if isinstance(module, nn.Linear)
    ]
    assert linears == ["1.mlp.c_fc"]
    torch.testing.assert_close(model(tokens()).logits, expected)
