"""QTIP: we read the weights that an independent decoder reads, or say why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qtip_decoder import decode
from qtip_files import write
from safetensors.torch import save_file

from softtrellis.io.checkpoint import WEIGHTS, load_quantized, read_manifest
from softtrellis.io.manifest import CheckpointError
from softtrellis.io.qtip import load_qtip
from softtrellis.modules.replace import (
    dequantize_,
    quantized_layers,
)
from softtrellis.recipes.exchange import import_from

LAYER = "model.layers.0.mlp.down_proj"


def layer_of(tensors: dict[str, torch.Tensor], name: str) -> dict[str, np.ndarray]:
    start = f"{name}."
    return {k.removeprefix(start): t.numpy() for k, t in tensors.items() if k.startswith(start)}


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        *(("1mad", (16, K, 1)) for K in (1, 2, 3, 4)),
        *(("3inst", (L, 2, 1)) for L in (12, 16)),
        *(("quantlut_sym", (16, K, 2)) for K in (1, 2, 3, 4)),
    ],
)
def test_an_independent_decoder_reads_the_same(
    tiny_tokenizer: Any, tmp_path: Path, mode: str, shape: tuple[int, int, int], uniform: bool
) -> None:
    tensors = write(tmp_path, tiny_tokenizer, mode, shape, uniform=uniform)
    found = load_qtip(tmp_path)
    layers = quantized_layers(found.model)
    assert len(layers) == 7
    assert set(found.rounded) == (set() if uniform else set(layers))
    for name in (LAYER, "model.layers.0.self_attn.k_proj"):
        expected = decode(layer_of(tensors, name), mode, *shape)
        weight = layers[name].weight().numpy()
        assert np.corrcoef(expected.ravel(), weight.ravel())[0, 1] > 0.9999
        error = np.abs(weight - expected).max() / np.abs(expected).max()
        assert error < (1e-5 if uniform else 2**-11 + 1e-5)
        assert torch.equal(layers[name].codes, tensors[f"{name}.trellis"])
        assert (layers[name].out_scale is None) == uniform


def test_float16_scales_are_kept_exactly(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tensors = write(tmp_path, tiny_tokenizer)
    for name in tensors:
        if name.endswith(".SV"):
            tensors[name] = tensors[name].half().float()
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert load_qtip(tmp_path).rounded == ()


def dense_model(source: Path, directory: Path) -> None:
    found = load_qtip(source)
    dequantize_(found.model)
    found.model.save_pretrained(directory)
    found.tokenizer.save_pretrained(directory)


def test_import_compares_with_the_base(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tensors = write(tmp_path / "qtip", tiny_tokenizer)
    dense_model(tmp_path / "qtip", tmp_path / "base")
    with pytest.raises(CheckpointError, match="with --base"):
        import_from(tmp_path / "qtip", tmp_path / "out")
    report = import_from(tmp_path / "qtip", tmp_path / "out", base=str(tmp_path / "base"))
    assert (report.layers, report.decoded, len(report.rounded)) == (7, {}, 7)
    assert min(report.correlations.values()) > 0.9999
    again = load_quantized(tmp_path / "out")
    assert torch.equal(
        quantized_layers(again)[LAYER].weight(),
        quantized_layers(load_qtip(tmp_path / "qtip").model)[LAYER].weight(),
    )
    assert read_manifest(tmp_path / "out").provenance["import"]["decode_mode"] == "quantlut_sym"
    assert "quip_params" not in json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    for name in tensors:
        if name.endswith(".trellis"):  # any other order: what is right in size alone
            tensors[name] = tensors[name].flip(1).contiguous()
    save_file(tensors, tmp_path / "qtip" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="correlates") as error:
        import_from(tmp_path / "qtip", tmp_path / "other", base=str(tmp_path / "base"))
    assert "QTIP's kernel" in error.value.__notes__[0]
    assert not (tmp_path / "other").exists()


def test_sides_that_are_no_powers_of_two(tiny_tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, tiny_tokenizer, intermediate_size=112)
    with pytest.raises(CheckpointError, match=r"112 channels, which is 16 times 7.*Hadamard"):
        load_qtip(tmp_path)


def test_layers_with_a_bias(tiny_tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, tiny_tokenizer, mlp_bias=True)
    with pytest.raises(CheckpointError, match="has a bias"):
        load_qtip(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode_mode": "lut"}, "decode_mode 'lut'; 1mad, 3inst, quantlut_sym can be imported"),
        ({"decode_mode": ["1mad"]}, "decode_mode"),
        ({"tlut_bits": 10}, "tlut_bits 10; 9 can"),
        ({"td_x": 8}, "td_x 8; 16 can"),
        ({"K": 5}, "k must be from 1 to 4"),
        ({"V": 1}, "two weights per step"),
        ({"L": "16"}, "L must be an integer"),
        ({"K": 3}, "trellis is .* and must be"),
    ],
)
def test_settings_that_do_not_fit(
    tiny_tokenizer: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path, tiny_tokenizer)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["quip_params"] |= change
    path.write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_qtip(tmp_path)


def changed(tensor: torch.Tensor, key: str) -> torch.Tensor | None:
    if key == "missing":
        return None
    return tensor.float() * float("nan") if key == "nan" else tensor[:-1].clone()


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("SU", "missing", "lacks its SU"),
        ("tlut", "missing", "lacks its tlut"),
        ("SV", "nan", "not finite"),
        ("SV", "short", "must be"),
        ("trellis", "short", "must be"),
        ("tlut", "other", "tables of HYB differ"),
    ],
)
def test_tensors_that_do_not_fit(
    tiny_tokenizer: Any, tmp_path: Path, key: str, change: str, message: str
) -> None:
    tensors = write(tmp_path, tiny_tokenizer)
    old = tensors.pop(f"{LAYER}.{key}")
    new = 2 * old if change == "other" else changed(old, change)
    if new is not None:
        tensors[f"{LAYER}.{key}"] = new
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_qtip(tmp_path)


def test_merged_layers_and_unknown_tensors(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tensors = write(tmp_path, tiny_tokenizer)
    merged = {name.replace("q_proj", "qkv_proj"): tensor for name, tensor in tensors.items()}
    save_file(merged, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="qkv_proj is no linear layer"):
        load_qtip(tmp_path)
    tensors[f"{LAYER}.extra"] = torch.ones(1)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="extra is no tensor"):
        load_qtip(tmp_path)
