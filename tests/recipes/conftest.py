"""Fixtures of the recipes' tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from recipes.support import Setting

from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture
def calibration_text() -> str:
    """Short text that the tiny tokenizer knows."""
    return "".join(f"Sphinx {i} of black quartz, judge my vow {i * i}. " for i in range(90))


@pytest.fixture
def quantize(
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    calibration_text: str,
) -> Callable[..., PreTrainedModel]:
    """Quantizes a copy of the tiny Llama."""
    path = tmp_path / "text.txt"
    path.write_text(calibration_text, encoding="utf-8")

    def run(changes: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
        settings = {"code": "gaussian", "L": 8, "ctx": 64, "windows": 8, "batch": 2}
        config = QuantizeConfig(data=(str(path),), **(settings | (changes or {})))
        model = copy.deepcopy(tiny_llama)
        return quantize_model(model, config, tokenizer=tiny_tokenizer, **options)

    return run


@pytest.fixture
def setting(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> Setting:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (6000,), generator=generator)
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, letters.tolist())), encoding="utf-8")
    return Setting(tiny_llama, tiny_tokenizer, str(path))
