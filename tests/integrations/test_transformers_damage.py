"""Damaged checkpoints through transformers: each is refused, with the name of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import softtrellis.integrations.transformers  # noqa: F401
from softtrellis.io.checkpoint import (
    MANIFEST,
    BaseModel,
    CheckpointError,
    LoadConfig,
    load_quantized,
    read_manifest,
    save_quantized,
)
from softtrellis.modules.replace import quantized_layers
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def checkpoint(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Two layers of `tiny_llama` in one code, one of them with scales of its channels."""
    layers = ("0.mlp.up_proj", "1.mlp.up_proj")
    config = QuantizeConfig(
        code="gaussian", L=8, layers=tuple(f"*.{name}" for name in layers), error_feedback=False
    )
    quantize_model(tiny_llama, config)
    layer = quantized_layers(tiny_llama)[LAYER]
    layer.set_scales(torch.ones(layer.in_features), torch.ones(layer.out_features))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_quantized(tiny_llama, tiny_tokenizer, folder, base=BaseModel("tiny", "0" * 64, "mit"))
    return folder


def load(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder)


def change_config(folder: Path, **changed: Any) -> None:
    """Sets keys of config.json's quantization_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changed)
    path.write_text(json.dumps(config))


def change_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Stores another tensor in the place of one."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: tensor}, path, metadata={"format": "pt"})


def tensor_of(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[name]


def layers_of(folder: Path) -> dict[str, Any]:
    layers: dict[str, Any] = json.loads((folder / "config.json").read_text())[
        "quantization_config"
    ]["layers"]
    return layers


def test_a_packed_layer_that_is_not_described(checkpoint: Path) -> None:
    layers = layers_of(checkpoint)
    del layers[LAYER]
    change_config(checkpoint, layers=layers)
    with pytest.raises(CheckpointError, match=rf"quantized layers lacks {LAYER};"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [("codes", torch.int32), ("scale", torch.float64), ("in_signs", torch.int16)],
    ids=str,
)
def test_packed_tensors_of_another_dtype(checkpoint: Path, key: str, dtype: torch.dtype) -> None:
    name = f"{LAYER}.{key}"
    change_tensor(checkpoint, name, tensor_of(checkpoint, name).to(dtype))
    with pytest.raises(CheckpointError, match=rf"{name} is {dtype} and must be"):
        load(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "called"),
    [
        *((f"{LAYER}.{key}", f"{LAYER}.{key}") for key in ("scale", "out_scale", "in_scale")),
        ("softtrellis.table", "the table of code 'gaussian'"),
    ],
)
def test_numbers_that_are_not_finite(
    checkpoint: Path, name: str, called: str, value: float
) -> None:
    tensor = tensor_of(checkpoint, name)
    tensor.view(-1)[-1] = value
    change_tensor(checkpoint, name, tensor)
    message = rf"{called} has numbers that are not finite"
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(checkpoint, LoadConfig(verify=False))


def test_an_unknown_key_of_the_configuration(checkpoint: Path) -> None:
    change_config(checkpoint, group_size=128)
    with pytest.raises(CheckpointError, match="unknown key 'group_size'"):
        load(checkpoint)


@pytest.mark.parametrize("version", ["2", 2.0, True, None])
def test_a_version_that_is_no_whole_number(checkpoint: Path, version: object) -> None:
    message = rf"format_version of .* must be a whole number, got {version!r};"
    change_config(checkpoint, format_version=version)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"format_version": version}))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(checkpoint)
