"""Dense models: transformers loads them alone, and they compute what the checkpoint computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from architectures import MOE, tiny_model, tokens
from safetensors.torch import load_file

from softtrellis.io.dense import DENSE_TYPES, save_dense
from softtrellis.io.manifest import BaseModel
from softtrellis.modules.replace import quantized_layers
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BASE = BaseModel("tiny", "0" * 64, "mit")
CONFIG = QuantizeConfig(code="gaussian", L=6, error_feedback=False)


def load(directory: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", *MOE])
def test_transformers_loads_the_same_function(
    family: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = quantize_model(tiny_model(family), CONFIG)
    expected = model(tokens(), use_cache=False).logits
    size = save_dense(model, tiny_tokenizer, tmp_path, dtype="float32", base=BASE)
    assert size == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    found = load(tmp_path)
    assert not quantized_layers(found)
    torch.testing.assert_close(
        found(tokens(), use_cache=False).logits, expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", DENSE_TYPES)
def test_weights_are_rounded_once(
    dtype: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = quantize_model(tiny_model("llama"), CONFIG)
    weights = {name: layer.weight() for name, layer in quantized_layers(model).items()}
    save_dense(model, tiny_tokenizer, tmp_path, dtype=dtype, base=BASE)
    kind = getattr(torch, dtype)
    found = load(tmp_path)
    assert found.dtype == kind
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {kind}
    for name, weight in weights.items():
        assert torch.equal(found.get_parameter(f"{name}.weight"), weight.to(kind))
    assert (tmp_path / "README.md").read_text("utf-8").startswith("---\nlicense: mit\n")
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_quantized_head_is_untied(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = QuantizeConfig(code="gaussian", L=6, head_bits=2, error_feedback=False)
    model = quantize_model(tiny_model("llama"), config)
    head = quantized_layers(model)["lm_head"].weight()
    save_dense(model, tiny_tokenizer, tmp_path, dtype="float32", base=BASE)
    assert torch.equal(load(tmp_path).lm_head.weight, head)


def test_values_and_types_that_do_not_fit(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = quantize_model(tiny_model("llama"), CONFIG)
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32"):
        save_dense(model, tiny_tokenizer, tmp_path, dtype="int8", base=BASE)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    with pytest.raises(ValueError, match=r"model\.norm\.weight has a value outside the range"):
        save_dense(model, tiny_tokenizer, tmp_path, dtype="float16", base=BASE)
