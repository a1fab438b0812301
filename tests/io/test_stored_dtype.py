"""Checkpoints are loaded by transformers in the dtype that the base model was stored in."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from softtrellis.io.checkpoint import (
    WEIGHTS,
    BaseModel,
    LoadConfig,
    base_of,
    load_quantized,
    save_quantized,
)
from softtrellis.io.sources import load_source
from softtrellis.io.stored_dtype import settings_dtype, stored_dtype
from softtrellis.modules import decode
from softtrellis.modules.decode import resolve_decode_backend
from softtrellis.modules.replace import cast_, quantized_layers
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CONFIG = QuantizeConfig(code="1mad", L=4, layers=("1.mlp.down_proj",), error_feedback=False)
IDS = torch.arange(3, 19)[None]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture
def base(
    tmp_path: Path,
    dtype: torch.dtype,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A model that was stored in ``dtype``."""
    tiny_llama.to(dtype).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path) -> Path:
    source = load_source(str(base))
    quantize_model(source.model, CONFIG)
    return save(source.model, source.tokenizer, tmp_path / "checkpoint", base_of(source))


def save(model: PreTrainedModel, tokenizer: Any, directory: Path, base: BaseModel) -> Path:
    directory.mkdir()
    save_quantized(model, tokenizer, directory, base=base)
    return directory


def settings_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text("utf-8"))
    return found


def from_pretrained(directory: Path, **options: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    import_module("softtrellis.integrations.transformers")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, **options)
    return model


def dtypes_of(model: PreTrainedModel) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def test_transformers_loads_the_dtype_of_the_base(checkpoint: Path, dtype: torch.dtype) -> None:
    assert settings_of(checkpoint)["dtype"] == str(dtype).removeprefix("torch.")
    model = from_pretrained(checkpoint)
    assert dtypes_of(model) == {dtype}
    assert model(IDS).logits.dtype == dtype
    model.save_pretrained(checkpoint.parent / "again")
    again = from_pretrained(checkpoint.parent / "again")
    assert dtypes_of(again) == {dtype}
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.gpu
def test_half_precision_reaches_the_kernels_of_a_gpu(
    checkpoint: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    decode._warn_of_float32.cache_clear()
    model = from_pretrained(checkpoint, device_map="cuda")
    with torch.no_grad():
        found = model(IDS.cuda()).logits
    assert ("at every call for float32" in caplog.text) == (dtype == torch.float32)
    like = torch.empty(0, device="cuda", dtype=model.dtype)
    assert (resolve_decode_backend("auto", like) == "torch") == (dtype == torch.float32)
    expected = load_quantized(checkpoint)(IDS).logits
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0.05, atol=0.05)


def test_softtrellis_computes_in_float32(base: Path, checkpoint: Path, dtype: torch.dtype) -> None:
    for model in (load_source(str(base)).model, load_quantized(checkpoint)):
        assert dtypes_of(model) == {torch.float32}
        assert model(IDS).logits.dtype == torch.float32
        assert model.config.dtype == dtype


def test_a_dtype_can_be_asked_for(checkpoint: Path, dtype: torch.dtype) -> None:
    expected, model = from_pretrained(checkpoint), load_quantized(checkpoint)
    found = load_quantized(checkpoint, LoadConfig(dtype=dtype))
    assert dtypes_of(found) == {dtype}
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
    for name, layer in quantized_layers(found).items():
        assert torch.equal(layer.weight(), quantized_layers(model)[name].weight())


def test_saving_again_keeps_it(checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoTokenizer

    tokenizer, base = AutoTokenizer.from_pretrained(checkpoint), BaseModel("tiny", "0" * 64)
    model = load_quantized(checkpoint)
    again = save(model, tokenizer, tmp_path / "again", base)
    assert (again / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
    assert (again / WEIGHTS).read_bytes() == (checkpoint / WEIGHTS).read_bytes()
    cast_(model, torch.bfloat16)  # by hand: this is what is stored now
    assert settings_of(save(model, tokenizer, tmp_path / "cast", base))["dtype"] == "bfloat16"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configuration_comes_first(base: Path, key: str) -> None:
    settings = settings_of(base)
    del settings["dtype"]
    (base / "config.json").write_text(json.dumps(settings | {key: "bfloat16"}), "utf-8")
    assert load_source(str(base)).model.config.dtype == torch.bfloat16


def test_then_the_tensors(base: Path, dtype: torch.dtype) -> None:
    settings = settings_of(base)
    del settings["dtype"]
    (base / "config.json").write_text(json.dumps(settings), "utf-8")
    assert stored_dtype(base) == dtype
    (base / "config.json").write_text(json.dumps(settings | {"torch_dtype": None}), "utf-8")
    assert load_source(str(base)).model.config.dtype == dtype
    counted = load_file(base / WEIGHTS) | {"a.count": torch.zeros((), dtype=torch.int64)}
    save_file(counted, base / WEIGHTS, metadata={"format": "pt"})
    assert stored_dtype(base) == dtype


@pytest.mark.parametrize("value", [None, 3, "float64", "int8", "nothing", {"": "bfloat16"}, []])
def test_other_values_say_nothing(value: object) -> None:
    assert settings_dtype({"dtype": value}) is None
    assert settings_dtype({"dtype": value, "torch_dtype": "float16"}) == torch.float16
