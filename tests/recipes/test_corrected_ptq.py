"""Whole models with weights corrected for the layers before, and on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from softtrellis.io.text import token_windows
from softtrellis.modules.blocks import Blocks
from softtrellis.recipes.calibration import paired_moments
from softtrellis.recipes.finetune import FineTuneConfig
from softtrellis.recipes.group import LayerReport

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TUNE = FineTuneConfig(epochs=2, lr=1e-2, scale_lr=1e-2, batch=2, held_out=0.25)
Quantize = Callable[..., "PreTrainedModel"]


def test_moments_of_both_streams(tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.randint(128, (5, 16), generator=torch.Generator().manual_seed(0))
    blocks = Blocks(tiny_llama, windows, device=torch.device("cpu"), batch=2)
    original = copy.deepcopy(blocks.layers[0])
    changed: Any = blocks.layers[0]
    with torch.no_grad():
        changed.mlp.gate_proj.weight.mul_(1.5)
    states = blocks.states + 0.1 * torch.randn(blocks.states.shape)
    seen: list[torch.Tensor] = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in (changed, original)
    ]
    with torch.no_grad():
        x, before = blocks.run(0, states), blocks.run(0, blocks.states, original)
        after = before
    for handle in handles:
        handle.remove()
    assert not torch.equal(x, before)
    x, before = (part.flatten(0, 1) for part in seen)
    hessian, cross = paired_moments(blocks, 0, states, original, blocks.states, "mlp.down_proj")
    torch.testing.assert_close(hessian, x.T @ x / len(x))
    torch.testing.assert_close(cross, before.T @ x / len(x))
    stream = blocks.states.clone()
    moments = paired_moments(blocks, 0, states, original, stream, "mlp.down_proj", advance=True)
    assert torch.equal(moments[0], hessian)
    assert torch.equal(moments[1], cross)
    torch.testing.assert_close(stream, after)


def test_corrected_weights_bring_the_model_nearer_to_the_original(
    quantize: Quantize,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    calibration_text: str,
) -> None:
    ids = token_windows(tiny_tokenizer, [calibration_text], 64, limit=8)
    lost = {}
    with torch.no_grad():
        expected = tiny_llama.model(ids).last_hidden_state
        for inputs in ("corrected", "quantized"):
            found = quantize({"inputs": inputs}).model(ids).last_hidden_state
            lost[inputs] = float((found - expected).square().sum() / expected.square().sum())
    assert lost["corrected"] < 0.9 * lost["quantized"]


@pytest.mark.gpu
@pytest.mark.parametrize("fine_tune", [None, TUNE], ids=["plain", "tuned"])
def test_a_gpu_does_what_the_cpu_does(
    quantize: Quantize, tiny_llama: LlamaForCausalLM, fine_tune: FineTuneConfig | None
) -> None:
    found: dict[str, dict[str, LayerReport]] = {"cpu": {}, "cuda": {}}
    models = {
        device: quantize({"device": device}, reports=reports, fine_tune=fine_tune)
        for device, reports in found.items()
    }
    for name, report in found["cpu"].items():
        other = found["cuda"][name]
        assert other.tokens == report.tokens
        assert other.proxy_loss == pytest.approx(report.proxy_loss, rel=0.2)
        assert other.error == pytest.approx(report.error, rel=0.1)
    assert {p.device.type for p in models["cuda"].parameters()} == {"cpu"}
    ids = torch.randint(128, (16, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny_llama(ids).logits
        lost = {device: (model(ids).logits - expected).norm() for device, model in models.items()}
    assert float(lost["cuda"]) == pytest.approx(float(lost["cpu"]), rel=0.25)
