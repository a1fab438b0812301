"""EXL3: what an independent decoder reads is our weight, and what we read back are our bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from exl3_decoder import decode, read_tensors
from safetensors.torch import load_file, save_file

from softtrellis.io.checkpoint import WEIGHTS, base_of, load_quantized, save_quantized
from softtrellis.io.exl3 import CODES, Exl3Layer, exl3_code, exl3_layer_format
from softtrellis.io.exl3_export import RECORD, save_exl3
from softtrellis.io.exl3_import import load_exl3
from softtrellis.io.manifest import BaseModel, CheckpointError
from softtrellis.io.sources import load_source
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.modules.replace import linear_names, quantized_layers, replace_modules
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.spec import TrellisSpec

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

BASE = BaseModel("tiny", "0" * 64, "mit")
LAYER = "model.layers.0.mlp.down_proj"


def random_layer(layer: LayerFormat, codebook: torch.Tensor) -> QuantizedLinear:
    """Any bits are a path and any signs a rotation."""
    module = QuantizedLinear(layer, codebook)
    module.codes.random_(-(2**15), 2**15)
    module.in_signs.random_(0, 256)
    module.out_signs.random_(0, 256)
    for scale in (module.in_scale, module.out_scale):
        if scale is not None:
            scale.uniform_(0.005, 0.03)
    if module.bias is not None:
        module.bias.normal_()
    return module


def quantize_randomly(
    model: PreTrainedModel, code: str = "mul1", bits: int = 2, *, in_scales: bool = False
) -> None:
    """Puts a random layer of EXL3 in the place of every linear layer."""
    form = exl3_code(code, bits)
    codebook = form.codebook()

    def make(_: str, linear: torch.nn.Module) -> QuantizedLinear:
        layer = exl3_layer_format(
            linear.in_features,
            linear.out_features,
            form,
            bias=linear.bias is not None,
            in_scales=in_scales,
        )
        return random_layer(layer, codebook)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        replace_modules(model, linear_names(model), make)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("code", CODES)
def test_an_independent_decoder_reads_our_weights(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    code: str,
    bits: int,
) -> None:
    quantize_randomly(tiny_llama, code, bits, in_scales=bits % 2 == 0)
    save_exl3(tiny_llama, tiny_tokenizer, tmp_path, base=BASE)
    tensors = read_tensors(tmp_path / WEIGHTS)
    for name in (LAYER, "model.layers.1.self_attn.k_proj"):
        layer = quantized_layers(tiny_llama)[name]
        assert tensors[f"{name}.trellis"].shape[2] == 16 * bits
        found = decode(tensors, name).T
        out, inputs = layer.out_features, layer.in_features
        weight = layer.weight().numpy()
        assert correlation(found[:out, :inputs], weight) > 0.9999
        np.testing.assert_allclose(found[:out, :inputs], weight, atol=1e-5 * np.abs(weight).max())
        assert not found[out:].any(), "outputs that pad the layer are zero"
        assert not found[:, inputs:].any(), "inputs that pad the layer do not count"


def test_a_wrong_code_would_be_noticed(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    quantize_randomly(tiny_llama, "mcg", 2)
    save_exl3(tiny_llama, tiny_tokenizer, tmp_path, base=BASE)
    tensors = read_tensors(tmp_path / WEIGHTS)
    del tensors[f"{LAYER}.mcg"]
    layer = quantized_layers(tiny_llama)[LAYER]
    found = decode(tensors, LAYER).T[: layer.out_features, : layer.in_features]
    weight = layer.weight().numpy()
    assert abs(correlation(found, weight)) < 0.1
    assert found.std() == pytest.approx(weight.std(), rel=0.1)


@pytest.mark.parametrize("size", [(128, 256), (384, 128), (130, 100), (16, 300)])
def test_layers_of_all_sizes(size: tuple[int, int]) -> None:
    from softtrellis.io.exl3 import exl3_tensors

    code = exl3_code("mul1", 3)
    module = random_layer(exl3_layer_format(*size, code, bias=False), code.codebook())
    stored = exl3_tensors(module)
    tensors = {f"x.{key}": tensor.numpy() for key, tensor in stored.items()}
    found = decode(tensors, "x").T[: size[1], : size[0]]
    assert correlation(found, module.weight().numpy()) > 0.9999
    back = Exl3Layer.of("x", stored, *size)
    assert torch.equal(back.weight(), module.weight())


def test_a_scale_of_the_matrix_folds_into_the_channels() -> None:
    from softtrellis.io.exl3 import exl3_tensors

    code = exl3_code("mul1", 2)
    module = random_layer(exl3_layer_format(128, 128, code, bias=False), code.codebook())
    module.scale.fill_(1.37)
    back = Exl3Layer.of("x", exl3_tensors(module), 128, 128)
    torch.testing.assert_close(back.weight(), module.weight(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("in_scales", [False, True])
def test_export_and_import_give_the_same_bits(
    tiny_directory: Path, tmp_path: Path, bits: int, in_scales: bool
) -> None:
    source = load_source(str(tiny_directory))
    base = base_of(source)
    quantize_randomly(source.model, CODES[bits % 3], bits, in_scales=in_scales)
    provenance = {"quantize": {"seed": 0, "windows": 4, "ctx": 32}}
    sizes = save_exl3(
        source.model,
        source.tokenizer,
        tmp_path,
        base=base,
        source_directory=source.directory,
        provenance=provenance,
    )
    assert sizes.layers == sizes.padded_layers == 14
    assert sizes.trellis_bits > bits, "padding is counted"
    found = load_exl3(tmp_path)
    assert (found.base, found.provenance, found.decoded) == (base, provenance, {})
    expected = quantized_layers(source.model)
    layers = quantized_layers(found.model)
    assert layers.keys() == expected.keys()
    for name, layer in expected.items():
        assert layers[name].layer == layer.layer
        for key, buffer in layer.state_dict().items():
            assert torch.equal(buffer, layers[name].state_dict()[key]), f"{name}.{key}"
        assert torch.equal(layer.weight(), layers[name].weight())
    config = found.model.config
    assert config.rope_parameters == source.model.config.rope_parameters
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
    ids = torch.arange(32)[None]
    torch.testing.assert_close(
        found.model(ids).logits, source.model(ids).logits, rtol=2e-2, atol=2e-2
    )
    (tmp_path / "again").mkdir()
    save_quantized(found.model, found.tokenizer, tmp_path / "again", base=found.base)
    again = quantized_layers(load_quantized(tmp_path / "again"))
    assert all(torch.equal(again[name].weight(), layer.weight()) for name, layer in layers.items())


def test_what_the_json_files_say(tiny_directory: Path, tmp_path: Path) -> None:
    source = load_source(str(tiny_directory))
    model = source.model
    quantize_randomly(model)
    for name, bits in ((LAYER, 3), ("lm_head", 4)):
        old = model.get_submodule(name)
        form = exl3_code("mul1", bits)
        shape = exl3_layer_format(old.in_features, old.out_features, form, bias=False)
        made = random_layer(shape, form.codebook())
        replace_modules(model, [name], lambda *_, made=made: made)
    model.config.tie_word_embeddings = False
    provenance = {"quantize": {"windows": 7, "ctx": 33}}
    save_exl3(model, source.tokenizer, tmp_path, base=BASE, provenance=provenance)
    settings = json.loads((tmp_path / "config.json").read_text("utf-8"))
    summary = settings["quantization_config"]
    assert summary.keys() == {
        *("quant_method", "version", "bits", "head_bits", "calibration", "out_scales", "codebook")
    }
    assert (summary["quant_method"], summary["codebook"]) == ("exl3", "mul1")
    assert summary["calibration"] == {"rows": 7, "cols": 33}
    assert 2 < summary["bits"] < 3
    assert summary["head_bits"] == 4
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"]
    assert not settings["tie_word_embeddings"]
    full = json.loads((tmp_path / "quantization_config.json").read_text("utf-8"))
    storage = full.pop("tensor_storage")
    assert full == summary
    tensors = load_file(tmp_path / WEIGHTS)
    listed = {name: of for each in storage.values() for name, of in each["stored_tensors"].items()}
    assert listed.keys() == tensors.keys()
    for name, entry in listed.items():
        assert entry["shape"] == list(tensors[name].shape)
        assert entry["dtype"] == str(tensors[name].dtype)
    down = storage[LAYER]
    assert (down["quant_format"], down["bits_per_weight"]) == ("exl3", 3)
    assert down["mul1_multiplier"] == 0x83DCD12D
    assert "quant_format" not in storage["model.embed_tokens"]
    assert tensors[f"{LAYER}.mul1"].item() == 0x83DCD12D - 2**32
    assert {t.dtype for t in tensors.values()} == {torch.float16, torch.int16, torch.int32}
    assert json.loads((tmp_path / RECORD).read_text("utf-8"))["base"]["licence"] == "mit"
    assert (tmp_path / "README.md").read_text("utf-8").startswith("---\nlicense: mit\n")
    found = load_exl3(tmp_path)
    head = quantized_layers(found.model)["lm_head"]
    assert torch.equal(head.weight(), quantized_layers(model)["lm_head"].weight())
    assert not found.model.config.tie_word_embeddings


OTHER_CODES: dict[str, tuple[TrellisCode, dict[str, Any], str]] = {
    "hyb": (TrellisCode(TrellisSpec()), {}, "its code is hyb, and EXL3 has mcg, mul1, 3inst"),
    "short": (
        TrellisCode(TrellisSpec(12, 2, 1), "mul1", normalize=False, order="exl3"),
        {"multiple": 128, "block": 128},
        "L=12",
    ),
    "normalized": (
        TrellisCode(TrellisSpec(16, 2, 1), "mul1", order="exl3"),
        {"multiple": 128, "block": 128},
        "normalize=True",
    ),
    "full width": (exl3_code("mul1", 2), {}, "it is rotated in full width"),
}


@pytest.mark.parametrize("name", OTHER_CODES)
def test_other_profiles_are_refused(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    name: str,
) -> None:
    code, options, reason = OTHER_CODES[name]
    layer = LayerFormat(112, 64, code, **options)
    module = QuantizedLinear(layer, code.codebook())
    replace_modules(tiny_llama, [LAYER], lambda *_: module)
    with pytest.raises(ValueError, match=f"{LAYER} cannot be written as EXL3: .*{reason}") as error:
        save_exl3(tiny_llama, tiny_tokenizer, tmp_path, base=BASE)
    assert "quantize --profile exl3" in str(error.value)
    assert "--format dense" in str(error.value)


def test_layers_that_are_not_quantized_need_partial(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    quantize_randomly(tiny_llama)
    dense = torch.nn.Linear(64, 64, bias=False)
    replace_modules(tiny_llama, ["model.layers.1.self_attn.q_proj"], lambda *_: dense)
    with pytest.raises(ValueError, match=r"1 linear layers are not quantized.*--partial"):
        save_exl3(tiny_llama, tiny_tokenizer, tmp_path, base=BASE)
    sizes = save_exl3(tiny_llama, tiny_tokenizer, tmp_path, base=BASE, partial=True)
    assert sizes.unquantized == ("model.layers.1.self_attn.q_proj",)
    found = load_exl3(tmp_path).model.model.layers[1].self_attn.q_proj
    assert torch.equal(found.weight, dense.weight.detach().half().float())


def test_values_that_float16_cannot_hold(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    quantize_randomly(tiny_llama)
    with torch.no_grad():
        tiny_llama.model.norm.weight[0] = 1e5
    with pytest.raises(ValueError, match=r"model\.norm\.weight cannot be written as EXL3"):
        save_exl3(tiny_llama, tiny_tokenizer, tmp_path, base=BASE)


def test_experts_are_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from architectures import tiny_model

    model = tiny_model("olmoe")
    config = QuantizeConfig(profile="exl3", layers=("q_proj",), error_feedback=False)
    quantize_model(model, config)
    with pytest.raises(ValueError, match=r"is a mixture of experts.*--format dense"):
        save_exl3(model, tiny_tokenizer, tmp_path, base=BASE, partial=True)


@pytest.mark.parametrize("features", [128, 96])
def test_biases(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, features: int) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=128,
        hidden_size=features,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = Qwen2ForCausalLM(config)
    quantize_randomly(model)
    if features % 128:
        with pytest.raises(ValueError, match="how EXL3 pads a bias is not known"):
            save_exl3(model, tiny_tokenizer, tmp_path, base=BASE)
        return
    save_exl3(model, tiny_tokenizer, tmp_path, base=BASE)
    found = quantized_layers(load_exl3(tmp_path).model)
    for name, layer in quantized_layers(model).items():
        if layer.bias is not None:
            assert torch.equal(found[name].bias, layer.bias.half().float()), name


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_layers_of_more_bits_become_dense(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    bits: int,
) -> None:
    quantize_randomly(tiny_llama)
    save_exl3(tiny_llama, tiny_tokenizer, tmp_path, base=BASE)
    tensors = load_file(tmp_path / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    old = tensors[f"{LAYER}.trellis"]
    words = torch.randint(-(2**15), 2**15, (*old.shape[:2], 16 * bits), generator=generator)
    tensors[f"{LAYER}.trellis"] = words.to(torch.int16)
    save_file(tensors, tmp_path / WEIGHTS)
    found = load_exl3(tmp_path)
    assert found.decoded == {LAYER: bits}
    expected = decode(read_tensors(tmp_path / WEIGHTS), LAYER).T[:64, :112]
    weight = found.model.get_parameter(f"{LAYER}.weight").numpy()
    np.testing.assert_allclose(weight, expected, atol=1e-5 * np.abs(expected).max())


def test_more_than_eight_bits_are_no_exl3(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    quantize_randomly(tiny_llama)
    save_exl3(tiny_llama, tiny_tokenizer, tmp_path, base=BASE)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[f"{LAYER}.trellis"] = torch.zeros(8, 8, 16 * 9, dtype=torch.int16)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="16 times 1 to 8 bits"):
        load_exl3(tmp_path)
