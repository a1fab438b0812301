"""Finding layers, and running the tail of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from softtrellis.modules.replace import (
    UnknownLayerError,
    decoder_layers,
    linear_names,
    select_layers,
)
from softtrellis.modules.tail import Tail

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def test_linears_of_the_decoder_layers_only(tiny_llama: LlamaForCausalLM) -> None:
    names = linear_names(tiny_llama)
    assert len(names) == 14
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert "lm_head" not in names


@pytest.mark.parametrize(
    ("patterns", "count"),
    [(None, 14), (["1"], 7), (["0-1"], 14), (["down_proj"], 2), (["*.1.mlp.*"], 3)],
)
def test_patterns(tiny_llama: LlamaForCausalLM, patterns: list[str] | None, count: int) -> None:
    assert len(select_layers(tiny_llama, patterns)) == count


@pytest.mark.parametrize("pattern", ["2", "1-0", "conv", "model.layers.0"])
def test_patterns_that_name_nothing(tiny_llama: LlamaForCausalLM, pattern: str) -> None:
    with pytest.raises(UnknownLayerError, match="decoder layers 0 to 1"):
        select_layers(tiny_llama, [pattern])


def test_models_without_layers() -> None:
    with pytest.raises(ValueError, match="no list of decoder layers"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("first", [0, 1])
def test_tail_on_stored_states_is_the_model(tiny_llama: LlamaForCausalLM, first: int) -> None:
    ids = torch.randint(128, (2, 20), generator=torch.Generator().manual_seed(0))
    tail = Tail(tiny_llama, first, ids[0])
    assert tail.first == first
    expected = tiny_llama.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(tail.features(tail.prefix(ids)), expected)


def test_a_model_that_scales_its_embeddings_is_not_cut() -> None:
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = GemmaForCausalLM(config).eval()
    ids = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(0))
    tail = Tail(model, 1, ids[0])
    expected = model.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(tail.features(tail.prefix(ids)), expected)
