"""Models of `load_quantized` in transformers: saved, dequantized and compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from integrations.support import IDS, assert_same, save
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig

import softtrellis.integrations.transformers  # noqa: F401
from softtrellis.io.checkpoint import load_quantized
from softtrellis.io.sources import load_source
from softtrellis.modules.replace import dequantize_, quantized_layers
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase


def quantized(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    """Two layers in two codes, one of which has a table that is stored."""
    for layer, code in (("0.self_attn.q_proj", "hyb"), ("1.mlp.up_proj", "1mad")):
        config = QuantizeConfig(code=code, L=10, layers=(f"*.{layer}",), error_feedback=False)
        quantize_model(model, config)
    return save(model, tokenizer, directory)


@pytest.fixture
def model(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    return load_quantized(quantized(tiny_llama, tiny_tokenizer, tmp_path / "checkpoint"))


def assert_loads_again(model: PreTrainedModel, directory: Path) -> None:
    """What `save_pretrained` writes has the same tensors and outputs, bit for bit."""
    model.save_pretrained(directory, max_shard_size="20KB")
    again: Any = AutoModelForCausalLM.from_pretrained(directory)
    assert_same(again, model)
    assert len(quantized_layers(again)) == len(quantized_layers(model))


def test_saved_and_loaded_again(model: PreTrainedModel, tmp_path: Path) -> None:
    assert len(quantized_layers(model)) == 2
    assert_loads_again(model, tmp_path / "again")


def test_stories260k_saved_and_loaded_again(stories260k: Path, tmp_path: Path) -> None:
    source = load_source(str(stories260k))
    folder = quantized(source.model, source.tokenizer, tmp_path / "checkpoint")
    assert_loads_again(load_quantized(folder), tmp_path / "again")


@pytest.mark.parametrize("ours", [True, False])
def test_dequantized_and_saved(model: Any, tmp_path: Path, ours: bool) -> None:
    dequantize_(model) if ours else model.dequantize(torch.float32)
    assert_loads_again(model, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config


def test_generate_compiles_it(model: Any) -> None:
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    torch.compiler.reset()
    counters.clear()
    config: Any = CompileConfig(backend="eager", mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True  # by default on a GPU only
    found = model.generate(
        IDS,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        cache_implementation="static",
        compile_config=config,
    )
    assert counters["stats"]["unique_graphs"] > 0
    assert torch.equal(found, expected)
