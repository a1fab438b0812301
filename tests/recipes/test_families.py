"""Models of other shapes than Llama's, from quantization to a reloaded checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from architectures import tiny_model, tokens
from torch import nn

from softtrellis.io.checkpoint import BaseModel, load_quantized, save_quantized
from softtrellis.modules.experts import UnfusedExperts, expert_layout
from softtrellis.modules.replace import linear_names, quantized_layers
from softtrellis.modules.unify import is_conv1d
from softtrellis.recipes.ptq import LayerReport, QuantizeConfig, quantize_model
from softtrellis.recipes.qat import DistillConfig, distill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 (and more)? " * 20


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def quantize(
    family: str, layers: tuple[str, ...] | None, tokenizer: PreTrainedTokenizerFast, text: str
) -> tuple[PreTrainedModel, dict[str, LayerReport]]:
    reports: dict[str, LayerReport] = {}
    config = QuantizeConfig(
        code="gaussian", L=8, layers=layers, data=(text,), ctx=64, windows=4, backend="torch"
    )
    model = quantize_model(tiny_model(family), config, tokenizer=tokenizer, reports=reports)
    return model, reports


# Family, layers, how many are quantized of how many.
CASES = [
    ("gpt2", None, 8, 8),
    ("gpt2", ("1",), 4, 8),
    ("olmoe", None, 24, 24),
    ("olmoe", ("1.mlp.experts.2.down_proj", "0.self_attn.q_proj"), 2, 24),
    ("gpt_oss", ("1",), 12, 24),
]


@pytest.mark.parametrize(("family", "layers", "count", "total"), CASES)
def test_a_reloaded_checkpoint_gives_the_same_logits(
    family: str,
    layers: tuple[str, ...] | None,
    count: int,
    total: int,
    tiny_tokenizer: PreTrainedTokenizerFast,
    text: str,
    tmp_path: Path,
) -> None:
    dense = tiny_model(family)
    model, reports = quantize(family, layers, tiny_tokenizer, text)
    assert list(reports) == list(quantized_layers(model))
    assert len(reports) == count
    assert all(0 < report.proxy_loss < 0.3 for report in reports.values())
    assert linear_names(model) == linear_names(dense)
    assert len(linear_names(model)) == total
    expected = model(tokens(), use_cache=False).logits
    assert bool(torch.isfinite(expected).all())
    assert not torch.equal(expected, dense(tokens(), use_cache=False).logits)
    folder = tmp_path / "out"
    folder.mkdir()
    save_quantized(model, tiny_tokenizer, folder, base=BaseModel("tiny", "0" * 64))
    loaded = load_quantized(folder)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(tokens(), use_cache=False).logits, expected)


def kinds(model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Names of the Conv1D, of the fused and of the unfused modules."""
    modules = dict(model.named_modules())
    return (
        [name for name, module in modules.items() if is_conv1d(module)],
        [name for name, module in modules.items() if expert_layout(module)],
        [name for name, module in modules.items() if isinstance(module, UnfusedExperts)],
    )


def test_only_what_is_chosen_is_exchanged(
    tiny_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    gpt2, _ = quantize("gpt2", ("1.mlp.c_fc",), tiny_tokenizer, text)
    assert len(kinds(gpt2)[0]) == 7
    olmoe, _ = quantize("olmoe", ("1.mlp.experts.2.down_proj",), tiny_tokenizer, text)
    assert kinds(olmoe)[1:] == (["model.layers.0.mlp.experts"], ["model.layers.1.mlp.experts"])


@pytest.mark.parametrize(
    ("family", "layer"), [("gpt2", "1.attn.c_proj"), ("olmoe", "1.mlp.experts.2.down_proj")]
)
def test_training_against_the_model_it_was_made_from(
    family: str, layer: str, tiny_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    model, _ = quantize(family, (layer,), tiny_tokenizer, text)
    names = list(quantized_layers(model))
    config = DistillConfig(
        data=(text,), ctx=32, steps=1, batch=1, t_init="auto", backend="torch", save_every=0
    )
    teacher = tiny_model(family)
    result = distill(model, config, teacher=teacher, tokenizer=tiny_tokenizer)
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in result.history)
    assert list(quantized_layers(result.model)) == names
