"""Checkpoints through transformers: the same bits, the same tokens, and back to disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from architectures import MOE, tiny_model
from integrations.support import IDS, assert_same, save
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from softtrellis.integrations.transformers import SofttrellisConfig
from softtrellis.io.checkpoint import (
    MANIFEST,
    CheckpointError,
    load_quantized,
    read_manifest,
)
from softtrellis.io.manifest import formats_json
from softtrellis.io.narrow import packed_names
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import (
    dequantize_,
    hold_weights_,
    quantized_layers,
    release_weights_,
)
from softtrellis.recipes.exchange import ExportConfig, export_to
from softtrellis.recipes.generation import load_for_generation
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

FIXTURES = Path(__file__).resolve().parents[1] / "io"


@pytest.fixture
def checkpoint(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """All layers of `tiny_llama`: three codes, channel scales in one layer, tied embeddings."""
    for layers, bits, code in (("0", 3, "gaussian"), ("1.mlp.*", 2, "hyb"), ("1.self*", 2, "1mad")):
        patterns = (layers if layers == "0" else f"*.{layers}",)
        config = QuantizeConfig(bits=bits, code=code, L=10, layers=patterns, error_feedback=False)
        quantize_model(tiny_llama, config)
    layer = quantized_layers(tiny_llama)["model.layers.1.mlp.up_proj"]
    generator = torch.Generator().manual_seed(0)
    layer.set_scales(
        1 + 0.1 * torch.randn(layer.in_features, generator=generator),
        1 + 0.1 * torch.randn(layer.out_features, generator=generator),
    )
    return save(tiny_llama, tiny_tokenizer, tmp_path / "checkpoint")


def load(directory: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, **options)
    return model


def test_from_pretrained_gives_what_load_quantized_gives(checkpoint: Path) -> None:
    model = load(checkpoint)
    assert len(quantized_layers(model)) == 14
    assert not model.training
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_same(model, load_quantized(checkpoint))


@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_before_are_loaded_by_their_manifest(version: int, tmp_path: Path) -> None:
    folder = FIXTURES / f"checkpoint_v{version}"
    assert "layers" not in json.loads((folder / "config.json").read_text())["quantization_config"]
    model = load(folder)
    assert_same(model, load_quantized(folder))
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)


@pytest.mark.parametrize("version", [2, 3])
def test_what_save_pretrained_wrote_before_is_loaded_by_its_config(version: int) -> None:
    """Version 2 as it is since config.json describes the layers, without a manifest."""
    folder = FIXTURES / f"checkpoint_v{version}_saved"
    assert not (folder / MANIFEST).exists()
    assert_same(load(folder), load_quantized(FIXTURES / f"checkpoint_v{version}"))


def test_config_says_what_the_manifest_says(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint).quantization_config
    layers = read_manifest(checkpoint).layers
    expected = {"quant_method": "softtrellis", "format_version": 3, **formats_json(layers)}
    assert config == expected
    assert SofttrellisConfig.from_dict(config).formats == dict(layers)
    (checkpoint / MANIFEST).unlink()
    assert len(quantized_layers(load(checkpoint))) == 14


def test_save_pretrained_and_load_again(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    again = load(tmp_path / "again")
    assert_same(again, model)
    again.save_pretrained(tmp_path / "third")
    assert_same(load(tmp_path / "third"), model)


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_what_bfloat16_holds_is_saved_in_it(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    size: str,
) -> None:
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.copy_(parameter.bfloat16())
    config = QuantizeConfig(L=10, layers=("*.1.mlp.*",), error_feedback=False)
    expected = quantize_model(tiny_llama, config)
    scale = "model.layers.1.mlp.up_proj.scale"
    expected.get_buffer(scale).fill_(0.5)
    model = load(save(expected, tiny_tokenizer, tmp_path / "checkpoint"))
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "again", max_shard_size=size)
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "again").glob("*.safetensors"):
        stored |= load_file(file)
    packed = packed_names(quantized_layers(model)) | {"softtrellis.table"}
    assert {stored[name].dtype for name in stored.keys() - packed} == {torch.bfloat16}
    assert stored[scale].dtype == torch.float32
    assert "lm_head.weight" not in stored, "tied"
    again = load(tmp_path / "again")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert_same(again, model)
    assert load(tmp_path / "again", dtype=torch.float16).dtype == torch.float16


def test_our_own_format_can_be_written_again(
    checkpoint: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load(checkpoint)
    assert_same(load_quantized(save(model, tiny_tokenizer, tmp_path / "again")), model)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(checkpoint: Path, device_map: Any) -> None:
    assert_same(load(checkpoint, device_map=device_map), load_quantized(checkpoint))


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda", {"model.layers.0": "cpu", "": "cuda"}], ids=str)
def test_device_maps_with_a_gpu(checkpoint: Path, device_map: Any) -> None:
    model = load(checkpoint, device_map=device_map)
    for name, layer in quantized_layers(model).items():
        assert layer.codes.device == layer.codebook.device, name
    found = model(IDS.cuda()).logits.cpu()
    torch.testing.assert_close(found, load_quantized(checkpoint)(IDS).logits, rtol=1e-3, atol=1e-3)


def shared(layers: Iterable[QuantizedLinear]) -> tuple[int, int]:
    """How many codebooks and how many tables there are."""
    pairs = [(id(layer.codebook), id(layer.table)) for layer in layers]
    codebooks, tables = zip(*pairs, strict=True)
    return len(set(codebooks)), len(set(tables))


def test_one_codebook_and_table_for_all_layers_of_a_code(checkpoint: Path) -> None:
    assert shared(quantized_layers(load(checkpoint)).values()) == (3, 3)
    assert shared(quantized_layers(load_quantized(checkpoint)).values()) == (3, 3)


def test_one_codebook_and_table_on_each_device(checkpoint: Path) -> None:
    model = load(checkpoint)
    layers = quantized_layers(model)
    quantizer: Any = model.hf_quantizer
    quantizer._codebooks = {layer.layer.code: layer.codebook for layer in layers.values()}
    moved = [layer.to("meta") for layer in layers.values() if layer.layer.code.name == "hyb"]
    moved.pop().to_empty(device="cpu")
    quantizer._process_model_after_weight_loading(model)
    assert all(layer.table.device == layer.codes.device for layer in layers.values())
    assert shared(layers.values()) == (4, 4)


@pytest.mark.gpu
def test_one_codebook_and_table_on_a_gpu(checkpoint: Path) -> None:
    model = load(checkpoint, device_map="cuda")
    assert shared(quantized_layers(model).values()) == (3, 3)
    assert shared(quantized_layers(model.cpu()).values()) == (3, 3)


def test_other_dtypes_leave_the_weights_as_they_are(checkpoint: Path) -> None:
    exact = quantized_layers(load_quantized(checkpoint))
    half = load(checkpoint, dtype=torch.bfloat16)
    cast = load(checkpoint).to(torch.bfloat16)
    for model in (half, cast):
        assert model.dtype == torch.bfloat16
        assert model(IDS).logits.dtype == torch.bfloat16
        for name, layer in quantized_layers(model).items():
            assert torch.equal(layer.weight(), exact[name].weight())


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_generation_in_bfloat16(checkpoint: Path, weights: Literal["packed", "dense"]) -> None:
    source = load_for_generation(str(checkpoint), weights=weights, dtype="bfloat16")
    expected = load(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in source.model.parameters()} == {torch.bfloat16}
    frequencies = {n: b for n, b in source.model.named_buffers() if "inv_freq" in n}
    assert frequencies
    for name, buffer in frequencies.items():
        assert torch.equal(buffer, expected.get_buffer(name))
    assert torch.equal(source.model(IDS).logits, expected(IDS).logits)


def generate(model: PreTrainedModel, ids: torch.Tensor = IDS, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
    tokens: list[list[int]] = model.generate(ids, **options)[:, ids.shape[1] :].tolist()
    return tokens


def test_the_packed_model_generates_what_the_dense_one_does(checkpoint: Path) -> None:
    model, dense = load(checkpoint), load_quantized(checkpoint)
    dequantize_(dense)
    assert not quantized_layers(dense)
    ids = torch.randint(128, (4, 8), generator=torch.Generator().manual_seed(0))
    expected = generate(dense, ids)
    assert len({token for row in expected for token in row}) > 3
    assert generate(model, ids) == expected
    hold_weights_(model, torch.float32)
    assert generate(model, ids) == expected
    release_weights_(model)
    assert generate(model, ids) == expected


def test_the_packed_model_generates_what_the_exported_one_does(
    checkpoint: Path, tmp_path: Path
) -> None:
    export_to(checkpoint, ExportConfig("dense", "float32"), tmp_path / "dense")
    exported = load(tmp_path / "dense")
    assert not quantized_layers(exported)
    assert exported.dtype == torch.float32
    ids = torch.randint(128, (4, 8), generator=torch.Generator().manual_seed(0))
    assert generate(load(checkpoint), ids) == generate(exported, ids)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_and_dense_generation_on_a_gpu(checkpoint: Path, dtype: torch.dtype) -> None:
    model = load(checkpoint, device_map="cuda", dtype=dtype)
    with torch.no_grad():
        fused = model(IDS.cuda()).logits
    for layer in quantized_layers(model).values():
        layer.backend = "torch"  # the kernels round in other places
    torch.testing.assert_close(fused, model(IDS.cuda()).logits, rtol=0.05, atol=0.05)
    packed = generate(model, IDS.cuda())
    hold_weights_(model, dtype)
    assert generate(model, IDS.cuda()) == packed


def test_batches_with_left_padding(checkpoint: Path) -> None:
    model = load(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left", pad_token="</s>")
    texts = ["Once upon a time", "The", "A cat sat"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch["attention_mask"][1, 0] == 0
    together = generate(
        model, batch["input_ids"], attention_mask=batch["attention_mask"], pad_token_id=2
    )
    alone = [generate(model, tokenizer(text, return_tensors="pt")["input_ids"]) for text in texts]
    assert together == [tokens for (tokens,) in alone]


def test_dequantize(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    expected = model(IDS).logits
    model.dequantize()
    assert not quantized_layers(model)
    assert torch.equal(model(IDS).logits, expected)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert torch.equal(load(tmp_path / "dense")(IDS).logits, expected)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("layer", ["1.mlp.experts.2.down_proj", "1.self_attn.q_proj"])
def test_experts(
    family: str, layer: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """One expert quantized, the others beside it dense; and none at all."""
    assert family in MOE
    model = tiny_model(family)
    config = QuantizeConfig(code="gaussian", L=8, layers=(layer,), error_feedback=False)
    quantize_model(model, config)
    folder = save(model, tiny_tokenizer, tmp_path / "checkpoint")
    loaded = load(folder)
    assert_same(loaded, load_quantized(folder))
    loaded.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), loaded)


def test_a_conv1d_of_gpt2(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("gpt2")
    config = QuantizeConfig(code="gaussian", L=8, layers=("1.mlp.c_fc",), error_feedback=False)
    quantize_model(model, config)
    folder = save(model, tiny_tokenizer, tmp_path / "checkpoint")
    loaded = load(folder)
    (module,) = quantized_layers(loaded).values()
    assert isinstance(module, QuantizedLinear)
    assert module.bias is not None
    assert_same(loaded, load_quantized(folder))


def test_another_version_is_refused(checkpoint: Path) -> None:
    change_config(checkpoint, format_version=99)
    with pytest.raises(CheckpointError, match="version 99"):
        load(checkpoint)


def test_damage_is_named(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    change_config(copy, codes=[])
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load(copy)
    copy = shutil.copytree(checkpoint, tmp_path / "no-table")
    tensors = load_file(copy / "model.safetensors")
    for lost, message in (
        ("model.layers.0.mlp.up_proj.codes", "lacks model.layers.0.mlp.up_proj.codes"),
        ("softtrellis.table", "lacks the table of code 'gaussian'"),
    ):
        kept = {name: tensor for name, tensor in tensors.items() if name != lost}
        save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load(copy)


def test_an_old_checkpoint_without_its_manifest_is_refused(tmp_path: Path) -> None:
    copy = shutil.copytree(FIXTURES / "checkpoint_v2", tmp_path / "copy")
    (copy / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"softtrellis\.json is not beside"):
        load(copy)


def test_a_model_of_another_shape_is_refused(checkpoint: Path) -> None:
    from transformers import AutoModel

    with pytest.raises(CheckpointError, match="load it with AutoModelForCausalLM"):
        AutoModel.from_pretrained(checkpoint)


def test_a_full_precision_model_is_not_quantized_on_the_way(tiny_directory: Path) -> None:
    with pytest.raises(ValueError, match="pre-quantized"):
        load(tiny_directory, quantization_config=SofttrellisConfig())


def test_without_the_import_transformers_only_warns(checkpoint: Path) -> None:
    """Documented in docs/huggingface.md: the model that it gives has random layers."""
    script = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", script, str(checkpoint)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "Unknown quantization type, got softtrellis" in run.stderr
    assert "MISSING" in run.stderr


def change_config(folder: Path, **changed: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changed)
    path.write_text(json.dumps(config))
