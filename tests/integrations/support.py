"""What the tests of packed models in transformers share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softtrellis.io.checkpoint import BaseModel, save_quantized

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IDS = torch.arange(3, 19)[None]


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    """Saves a model in a new directory."""
    directory.mkdir()
    save_quantized(model, tokenizer, directory, base=BaseModel("tiny", "0" * 64, "mit"))
    return directory


def assert_same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """The same tensors and the same outputs, bit for bit."""
    tensors, others = found.state_dict(), expected.state_dict()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
