"""Models of many families with all layers packed, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from architectures import DENSE, MOE, tiny_model, tokens
from transformers import AutoModelForCausalLM

import softtrellis.integrations.transformers  # noqa: F401
from softtrellis.io.checkpoint import BaseModel, load_quantized, save_quantized
from softtrellis.modules.replace import quantized_layers
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_all_layers(
    family: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, one_thread: None
) -> None:
    model = tiny_model(family)
    quantize_model(model, QuantizeConfig(code="gaussian", L=6, layers=None, error_feedback=False))
    save_quantized(model, tiny_tokenizer, tmp_path, base=BaseModel("tiny", "0" * 64, "mit"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert quantized_layers(found).keys() == quantized_layers(model).keys()
    assert torch.equal(found(tokens()).logits, load_quantized(tmp_path)(tokens()).logits)
