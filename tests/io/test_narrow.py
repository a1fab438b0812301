"""Tensors stored as bfloat16: half the bytes, the same bits back, and only where that is so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from architectures import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from softtrellis.io.checkpoint import (
    MANIFEST,
    WEIGHTS,
    BaseModel,
    CheckpointError,
    LoadConfig,
    load_quantized,
    load_tokenizer,
    read_manifest,
    save_quantized,
    size_report,
)
from softtrellis.io.dense import save_dense
from softtrellis.io.exl3_export import save_exl3
from softtrellis.io.narrow import narrow_, narrowed, packed_names, widened
from softtrellis.io.sources import load_source
from softtrellis.modules.replace import quantized_layers
from softtrellis.recipes.exchange import ExportConfig, export_to
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

BASE = BaseModel("tiny", "0" * 64, "mit")
EMBEDDINGS = "model.embed_tokens.weight"
LAYERS = ("1.mlp.down_proj", "1.self_attn.k_proj")
PACKED = "model.layers.1.mlp.down_proj"
BITS = [0, -(2**31), 0x3F80_0000, 0x7F80_0000, 0x7FC0_0000, 0x7F81_0000, -0x1_0000, 0x1_0000]
"""Of float32: zeros, one, infinity, NaNs (quiet, signalling, with a sign), a subnormal number."""


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(
        found.contiguous().reshape(-1).view(torch.uint8),
        expected.contiguous().reshape(-1).view(torch.uint8),
    )


def assert_same_tensors(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    tensors, others = found.state_dict(), expected.state_dict()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert same_bits(tensor, others[name]), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("repeats", [1, 100], ids=["few", "many"])
def test_every_bit_comes_back(repeats: int, device: str) -> None:
    bits = torch.tensor(BITS * repeats, dtype=torch.int32, device=device)
    values = bits.view(torch.float32).reshape(-1, 4)
    for tensor in (values, values.T, values[:, 1:3], values[0, 2], values[:0]):
        half = narrowed(tensor)
        assert half is not None
        assert (half.dtype, half.device.type) == (torch.bfloat16, "cpu")
        assert half.shape == tensor.shape
        assert half.is_contiguous()
        assert same_bits(widened({"a": half}, ["a"])["a"], tensor.cpu())


@pytest.mark.parametrize("bit", [0, 7, 15])
@pytest.mark.parametrize("value", [0x3F80_0000, 0x7FC0_0000, 0], ids=["one", "nan", "zero"])
def test_one_bit_too_many_is_kept(value: int, bit: int) -> None:
    bits = torch.tensor([*BITS, value | 1 << bit], dtype=torch.int32)
    assert narrowed(bits.view(torch.float32)) is None


def test_what_is_left_as_it_is() -> None:
    tensors = {
        "packed": torch.ones(4),
        "half": torch.ones(4, dtype=torch.float16),
        "double": torch.ones(4, dtype=torch.float64),
        "whole": torch.ones(4, dtype=torch.int64),
        "elsewhere": torch.ones(4, device="meta"),
        "exact": torch.full((4,), 1 / 3),
        "narrow": torch.ones(4),
    }
    before = dict(tensors)
    assert narrow_(tensors, {"packed"}) == ["narrow"]
    assert [name for name in before if tensors[name] is not before[name]] == ["narrow"]


def test_tensors_that_share_memory_still_do() -> None:
    table = torch.ones(4, 4)
    tensors = {"a": table, "b": table.detach(), "part": table[:2], "other": table.clone()}
    assert narrow_(tensors, ()) == ["a", "b", "other", "part"]
    assert tensors["a"].data_ptr() == tensors["b"].data_ptr()
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == 3
    assert tensors["part"].shape == (2, 4)


@pytest.fixture
def bfloat16_model(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> PreTrainedModel:
    """A model that was saved in bfloat16, loaded in float32, with two quantized layers."""
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    model = load_source(str(tmp_path / "base")).model
    quantize_model(model, QuantizeConfig(L=10, layers=LAYERS, error_feedback=False))
    quantized_layers(model)[PACKED].scale.fill_(0.5)  # bfloat16 holds it
    return model


@pytest.fixture
def checkpoint(
    bfloat16_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    return save(bfloat16_model, tiny_tokenizer, tmp_path / "checkpoint")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    directory.mkdir()
    save_quantized(model, tokenizer, directory, base=BASE)
    return directory


def test_a_bfloat16_model_takes_half(bfloat16_model: PreTrainedModel, checkpoint: Path) -> None:
    stored = load_file(checkpoint / WEIGHTS)
    packed = packed_names(quantized_layers(bfloat16_model)) | {"softtrellis.table"}
    dense = stored.keys() - packed
    assert {stored[name].dtype for name in dense} == {torch.bfloat16}
    assert stored[EMBEDDINGS].nbytes == 128 * 64 * 2
    assert "lm_head.weight" not in stored, "tied"
    assert stored[f"{PACKED}.scale"].dtype == torch.float32
    assert stored["softtrellis.table"].dtype == torch.float32
    assert read_manifest(checkpoint).narrowed == sorted(dense)
    loaded = load_quantized(checkpoint)
    assert loaded.dtype == torch.float32
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert_same_tensors(loaded, bfloat16_model)
    size = size_report(checkpoint)
    assert size.file_bytes == sum(path.stat().st_size for path in checkpoint.iterdir())
    bits = sum(8 * stored[name].nbytes for name in packed if name in stored)
    assert size.stored_bits == bits / size.weights


def test_a_float32_model_stays_float32(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.view(-1)[0] = 1 / 3  # norms are all ones otherwise
    model = quantize_model(tiny_llama, QuantizeConfig(L=10, layers=LAYERS, error_feedback=False))
    folder = save(model, tiny_tokenizer, tmp_path / "checkpoint")
    assert read_manifest(folder).narrowed == []
    for name, tensor in load_file(folder / WEIGHTS).items():
        if not name.startswith("softtrellis."):
            assert same_bits(tensor, model.state_dict()[name]), name
    assert_same_tensors(load_quantized(folder), model)


def test_tensors_of_several_dtypes_keep_them(
    bfloat16_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bfloat16_model.get_submodule("model.norm").to(torch.bfloat16)
    bfloat16_model.get_submodule("model.layers.0.mlp").to(torch.float16)
    bfloat16_model.get_submodule("model.layers.0.self_attn").to(torch.float64)
    folder = save(bfloat16_model, tiny_tokenizer, tmp_path / "checkpoint")
    assert "model.norm.weight" not in read_manifest(folder).narrowed
    assert_same_tensors(load_quantized(folder), bfloat16_model)


def test_biases_of_quantized_layers(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).bfloat16())
    layers = ("1.mlp.c_fc",)
    quantize_model(model, QuantizeConfig(L=10, layers=layers, error_feedback=False))
    folder = save(model, tiny_tokenizer, tmp_path / "checkpoint")
    assert load_file(folder / WEIGHTS)["transformer.h.1.mlp.c_fc.bias"].dtype == torch.bfloat16
    assert_same_tensors(load_quantized(folder), model)


def test_what_is_saved_again_is_the_same(checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = load_quantized(checkpoint), load_tokenizer(checkpoint)
    (tmp_path / "again").mkdir()
    save_quantized(model, tokenizer, tmp_path / "again", base=BASE)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (checkpoint / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", ["dense", "exl3"])
def test_exports_are_those_of_the_model(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_llama: LlamaForCausalLM, tmp_path: Path, name: str
) -> None:
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.copy_(parameter.bfloat16())
    config = QuantizeConfig(profile="exl3", layers=LAYERS, error_feedback=False)
    model = quantize_model(tiny_llama, config)
    folder = save(model, tiny_tokenizer, tmp_path / "checkpoint")
    direct = tmp_path / "direct"
    direct.mkdir()
    if name == "exl3":
        export_to(folder, ExportConfig("exl3", partial=True), tmp_path / "export")
        save_exl3(model, tiny_tokenizer, direct, base=BASE, partial=True)
    else:
        export_to(folder, ExportConfig("dense", dtype="float32"), tmp_path / "export")
        save_dense(model, tiny_tokenizer, direct, dtype="float32", base=BASE)
    assert (tmp_path / "export" / WEIGHTS).read_bytes() == (direct / WEIGHTS).read_bytes()


def change_names(names: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = json.loads((folder / MANIFEST).read_text("utf-8"))
        (folder / MANIFEST).write_text(json.dumps(value | {"narrowed": names}), "utf-8")

    return change


def change_dtype(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors[name] = tensors[name].to(dtype)
        save_file(tensors, folder / WEIGHTS)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_dtype(f"{PACKED}.codes", torch.int32), "codes is torch.int32 and must be"),
        (change_dtype(f"{PACKED}.codes", torch.float32), "codes is torch.float32 and must be"),
        (change_dtype(f"{PACKED}.in_signs", torch.int8), "in_signs is torch.int8"),
        (change_dtype(f"{PACKED}.scale", torch.bfloat16), "scale is torch.bfloat16"),
        (
            change_dtype("softtrellis.table", torch.bfloat16),
            "table of code 'hyb' is torch.bfloat16",
        ),
        (change_dtype(EMBEDDINGS, torch.int16), "weight is torch.int16 and must be torch.float32"),
        (change_dtype(EMBEDDINGS, torch.float8_e5m2), "float8_e5m2 and must be torch.float32"),
        (change_dtype(EMBEDDINGS, torch.float32), "float32 and must be bfloat16"),
        (change_dtype(EMBEDDINGS, torch.float16), "float16 and must be bfloat16"),
        (change_names([f"{PACKED}.codes"]), "int16 and must be bfloat16"),
        (change_names(["softtrellis.table"]), "lacks softtrellis.table"),
        (change_names(["nowhere"]), "lacks nowhere"),
        (change_names([3]), "narrowed is no list of names"),
        (change_names({EMBEDDINGS: 1}), "narrowed is no list of names"),
        (change_names(None), "narrowed is no list of names"),
    ],
)
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(checkpoint, LoadConfig(verify=False))


def test_a_manifest_without_the_names_is_damaged(checkpoint: Path) -> None:
    value = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
    del value["narrowed"]
    (checkpoint / MANIFEST).write_text(json.dumps(value), "utf-8")
    with pytest.raises(CheckpointError, match="KeyError: 'narrowed'"):
        read_manifest(checkpoint)
