"""The plugin against vLLM's interfaces, without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from softtrellis.io.checkpoint import load_quantized
from softtrellis.modules.replace import quantized_layers

FIXTURE = Path(__file__).resolve().parents[1] / "io" / "checkpoint_v2"
LAYER = "model.layers.0.mlp"

pytest.importorskip("vllm", reason="needs vLLM, which the plugin is for")

from vllm.model_executor.layers.linear import (  # noqa: E402
    LinearBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402

from softtrellis.integrations.vllm import (  # noqa: E402
    SofttrellisLinearMethod,
    SofttrellisVllmConfig,
    register,
)


@pytest.fixture
def config(tmp_path: Path) -> SofttrellisVllmConfig:
    """Of the fixture, saved anew so that config.json describes the layers."""
    import shutil

    from transformers import AutoModelForCausalLM

    import softtrellis.integrations.transformers  # noqa: F401

    folder = tmp_path / "checkpoint"
    AutoModelForCausalLM.from_pretrained(FIXTURE).save_pretrained(folder)
    value = json.loads((folder / "config.json").read_text())["quantization_config"]
    made = SofttrellisVllmConfig.from_config(value)
    made.packed_modules_mapping = {
        "gate_up_proj": ["gate_proj", "up_proj"],
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    }
    made.maybe_update_config(str(folder))
    shutil.rmtree(folder)
    return made


class Linear(LinearBase):
    """A linear layer of vLLM without its distributed set-up."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def test_the_method_is_registered() -> None:
    register()
    register()
    assert get_quantization_config("softtrellis") is SofttrellisVllmConfig


def test_stacked_layers_are_decoded_after_loading(config: SofttrellisVllmConfig) -> None:
    layer = Linear()
    method = config.get_quant_method(layer, f"{LAYER}.gate_up_proj")
    assert isinstance(method, SofttrellisLinearMethod)
    method.create_weights(layer, 32, [48, 48], 32, 96, torch.float32, weight_loader=None)
    tensors = load_file(FIXTURE / "model.safetensors")
    for shard, part in enumerate(("gate_proj", "up_proj")):
        for name, tensor in tensors.items():
            if name.startswith(f"{LAYER}.{part}."):
                parameter = layer.get_parameter(name.rpartition(".")[2])
                parameter.weight_loader(parameter, tensor, shard)
    method.process_weights_after_loading(layer)
    expected = quantized_layers(load_quantized(FIXTURE))
    weights = [expected[f"{LAYER}.{part}"].weight() for part in ("gate_proj", "up_proj")]
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert torch.equal(layer.weight, torch.cat(weights))
    x = torch.randn(3, 32)
    assert torch.equal(method.apply(layer, x), x @ torch.cat(weights).T)


def test_what_cannot_be_loaded_is_refused(config: SofttrellisVllmConfig) -> None:
    with pytest.raises(ValueError, match="quantized in part"):
        config.get_quant_method(Linear(), "model.layers.0.self_attn.qkv_proj")
    method = config.get_quant_method(Linear(), f"{LAYER}.down_proj")
    with pytest.raises(ValueError, match="tensor-parallel-size 1"):
        method.create_weights(Linear(), 24, [32], 48, 32, torch.float32)
    with pytest.raises(ValueError, match="linear layers only"):
        config.get_quant_method(nn.Embedding(2, 2), f"{LAYER}.down_proj")


def test_other_layers_are_left_to_vllm(config: SofttrellisVllmConfig) -> None:
    method = config.get_quant_method(Linear(), "model.layers.7.mlp.down_proj")
    assert isinstance(method, UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
