"""The linear layers of many families are found by walking their modules."""

from __future__ import annotations

import pytest
import torch
from architectures import DENSE, MOE, tiny_model, tokens
from torch import nn

from softtrellis.modules.replace import (
    UnsupportedLayerError,
    decoder_index,
    decoder_layers,
    get_linear,
    linear_names,
    prepare_for_layers_,
    select_layers,
)
from softtrellis.modules.unify import is_plain_linear


@pytest.mark.parametrize("family", DENSE)
def test_all_linears_of_the_decoder_layers(family: str) -> None:
    _, prefix, expected = DENSE[family]
    model = tiny_model(family)
    assert decoder_layers(model)[0] == prefix
    names = linear_names(model)
    for index in range(2):
        found = [name for name in names if decoder_index(model, name) == index]
        assert sorted(found) == sorted(f"{prefix}.{index}.{name}" for name in expected)
    _, layers = decoder_layers(model)
    matrices = [name for name, weight in layers.named_parameters(prefix) if weight.ndim > 1]
    assert sorted(matrices) == sorted(f"{name}.weight" for name in names)


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_preparing_keeps_the_function_and_the_names(family: str) -> None:
    model = tiny_model(family)
    names = select_layers(model, None)
    before = model(tokens(), use_cache=False).logits
    prepare_for_layers_(model, names)
    torch.testing.assert_close(
        model(tokens(), use_cache=False).logits, before, rtol=1e-5, atol=1e-5
    )
    assert linear_names(model) == names
    assert all(is_plain_linear(get_linear(model, name)) for name in names)


def test_the_list_of_layers_is_the_one_with_the_weights() -> None:
    layer = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(9))})
    model = nn.ModuleDict(
        {
            "small": nn.ModuleList(nn.Linear(2, 2) for _ in range(7)),
            "layers": nn.ModuleList([layer, nn.Linear(4, 4)]),
        }
    )
    assert decoder_layers(model)[0] == "layers"
    assert decoder_index(model, "layers.1") == 1
    assert decoder_index(model, "layers.0.experts.8") == 0
    with pytest.raises(ValueError, match="in no decoder layer"):
        decoder_index(model, "small")


class Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).softmax(dim=-1)


class Transposed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


def test_what_counts_as_a_linear_layer() -> None:
    assert is_plain_linear(nn.Linear(16, 8))
    assert is_plain_linear(Transposed(16, 8))
    assert not is_plain_linear(Router(16, 8))
    assert not is_plain_linear(nn.Embedding(16, 8))


def test_stacks_of_an_unknown_layout_are_refused_by_name() -> None:
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=4,
    )
    model = JetMoeForCausalLM(config)
    message = (
        r"model\.layers\.0\.mlp\.input_linear\.weight \(JetMoeParallelExperts, \[4, 48, 32\]\)"
    )
    with pytest.raises(UnsupportedLayerError, match=message):
        select_layers(model, None)
    with pytest.raises(UnsupportedLayerError, match=r"model\.layers\.1\.mlp"):
        select_layers(model, ["1"])
    chosen = select_layers(model, ["kv_proj"])
    assert chosen == [f"model.layers.{i}.self_attention.kv_proj" for i in range(2)]
