"""Whole models decoder layer by decoder layer: streams, tuning, maps of bits, interrupted runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from softtrellis.io.checkpoint import base_of, load_quantized, save_quantized
from softtrellis.io.files import whole_directory
from softtrellis.io.sources import Source
from softtrellis.modules.blocks import Blocks, _alike
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import UnknownLayerError, quantized_layers
from softtrellis.modules.scaled_linear import ScaledLinear, scale_, unscale_
from softtrellis.recipes import block_ptq, ptq
from softtrellis.recipes.calibration import watch_inputs
from softtrellis.recipes.end_to_end import EndToEndConfig
from softtrellis.recipes.finetune import FineTuneConfig, TuneReport, tune_block
from softtrellis.recipes.group import LayerReport
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TUNE = FineTuneConfig(epochs=2, lr=1e-2, scale_lr=1e-2, batch=2, held_out=0.25)
Quantize = Callable[..., "PreTrainedModel"]


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_blocks_are_the_model(tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.randint(128, (5, 16))
    blocks = Blocks(tiny_llama, windows, device=torch.device("cpu"), batch=2)
    assert blocks.batch == 2
    states = blocks.states
    for index in range(len(blocks.layers)):
        states = blocks.run_all(index, states)
    with torch.no_grad():
        expected = tiny_llama.model(windows, use_cache=False).last_hidden_state
        torch.testing.assert_close(tiny_llama.model.norm(states), expected)


def test_blocks_and_tuning_in_bfloat16(tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.randint(128, (6, 16), generator=torch.Generator().manual_seed(0))
    exact = Blocks(tiny_llama, windows, device=torch.device("cpu"), batch=3)
    expected = exact.run_all(0, exact.states)
    quantize_model(tiny_llama, QuantizeConfig(code="gaussian", L=8, error_feedback=False))
    blocks = Blocks(
        tiny_llama, windows, device=torch.device("cpu"), batch=3, autocast=torch.bfloat16
    )
    assert blocks.batch == 3
    assert blocks.states.dtype == torch.float32
    linears = {n: m for n, m in tiny_llama.model.layers[1].named_modules() if "_proj" in n}
    moments, output = watch_inputs(blocks, 1, blocks.states, linears, linears)  # type: ignore[arg-type]
    assert output.dtype == torch.float32
    assert all(moment.total.dtype == torch.float32 for moment in moments.moments.values())
    report = tune_block(blocks, 0, blocks.states, expected, TUNE, [])
    assert report.after < report.before


def test_hessians_come_through_the_layers_before_as_they_are_quantized(quantize: Quantize) -> None:
    reports: dict[str, dict[str, LayerReport]] = {"quantized": {}, "original": {}}
    models = {
        inputs: quantize({"inputs": inputs}, reports=found) for inputs, found in reports.items()
    }
    first, later = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    assert reports["quantized"][first].proxy_loss == reports["original"][first].proxy_loss
    assert reports["quantized"][later].proxy_loss != reports["original"][later].proxy_loss
    assert reports["quantized"][later].tokens == 8 * 64
    assert not same(models["quantized"], models["original"])


def test_layers_that_share_inputs_rotate_them_alike(quantize: Quantize) -> None:
    layers = quantized_layers(quantize())
    signs = {name.removeprefix("model.layers."): layer.in_signs for name, layer in layers.items()}
    q, k = signs["0.self_attn.q_proj"], signs["0.self_attn.k_proj"]
    assert torch.equal(q, k)
    assert not torch.equal(q, signs["1.self_attn.q_proj"])
    alone = quantized_layers(quantize({"layers": ("0.self_attn.k_proj",)}))
    assert torch.equal(alone["model.layers.0.self_attn.k_proj"].in_signs, k)


@pytest.mark.parametrize("inputs", ["corrected", "quantized", "original"])
def test_tuning_brings_blocks_nearer_to_the_original(
    quantize: Quantize, inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TuneReport] = []
    tune = block_ptq.tune_block

    def spy(*args: Any) -> TuneReport:
        seen.append(tune(*args))
        return seen[-1]

    monkeypatch.setattr(block_ptq, "tune_block", spy)
    model = quantize({"inputs": inputs}, fine_tune=TUNE)
    assert len(seen) == 8  # four groups in two layers
    assert all(report.after <= report.before for report in seen)
    assert sum(report.after < 0.97 * report.before for report in seen) >= 6
    layers = quantized_layers(model)
    assert len(layers) == 14
    for layer in layers.values():
        assert layer.in_scale is not None
        assert layer.out_scale is not None
        assert layer.layer.in_scales
    assert not any(parameter.requires_grad for parameter in model.model.layers.parameters())
    assert not any(isinstance(module, ScaledLinear) for module in model.modules())


def test_scales_do_what_the_layer_does(quantize: Quantize) -> None:
    model = quantize()
    ids = torch.randint(128, (2, 16))
    before = model(ids).logits
    scale_(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    unscale_(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_bits_by_layer_and_skipped_layers(quantize: Quantize) -> None:
    bits_map = (("down_proj", 3), ("1.mlp.down_proj", 4))
    layers = quantized_layers(quantize({"bits_map": bits_map, "skip": ("o_proj", "*.0.mlp.up*")}))
    bits = {name.removeprefix("model.layers."): x.layer.code.spec.k for name, x in layers.items()}
    assert bits["0.mlp.down_proj"] == 3
    assert bits["1.mlp.down_proj"] == 4
    assert bits["1.mlp.up_proj"] == 2
    assert "0.mlp.up_proj" not in bits
    assert len(bits) == 11
    with pytest.raises(UnknownLayerError, match="head"):
        quantize({"bits_map": (("head", 3),)})
    with pytest.raises(ValueError, match="skip leaves no layer"):
        quantize({"skip": ("*",)})


@pytest.mark.parametrize("feedback", [True, False])
def test_the_output_layer(
    quantize: Quantize,
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    feedback: bool,
) -> None:
    changes = {"head_bits": 3, "layers": ("*.0.mlp.*",), "error_feedback": feedback}
    reports: dict[str, LayerReport] = {}
    model = quantize(changes, reports=reports, run_directory=tmp_path)
    head = model.get_output_embeddings()
    assert isinstance(head, QuantizedLinear)
    assert head.layer.code.spec.k == 3
    assert list(reports)[-1] == "lm_head"
    assert reports["lm_head"].tokens == (8 * 64 if feedback else 0)
    assert reports["lm_head"].error < 0.05
    assert torch.equal(model.model.embed_tokens.weight, tiny_llama.model.embed_tokens.weight)
    out = tmp_path / "out"
    out.mkdir()
    base = base_of(Source("tiny", tiny_llama, tiny_tokenizer, None, "mit"))
    save_quantized(model, tiny_tokenizer, out, base=base)
    loaded = load_quantized(out)
    ids = torch.randint(128, (2, 16))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    if feedback:
        assert same(quantize(changes, run_directory=tmp_path, resume=True), model)


def test_what_the_output_layer_takes(tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.randint(128, (3, 16))
    blocks = Blocks(tiny_llama, windows, device=torch.device("cpu"), batch=3)
    states = blocks.states
    for index in range(len(blocks.layers)):
        states = blocks.run_all(index, states)
    with torch.no_grad():
        expected = tiny_llama.model(windows, use_cache=False).last_hidden_state
    torch.testing.assert_close(blocks.last_hidden(states), expected)


@pytest.mark.parametrize("fine_tune", [None, TUNE], ids=["plain", "tuned"])
@pytest.mark.parametrize("stop", [0, 1])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    quantize: Quantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fine_tune: FineTuneConfig | None,
    stop: int,
) -> None:
    whole = quantize(fine_tune=fine_tune)
    save = block_ptq.LayerStore.save
    redone: list[int] = []

    def save_or_stop(self: Any, index: int, *rest: Any) -> None:
        save(self, index, *rest)
        redone.append(index)
        if index == stop and len(redone) == stop + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(block_ptq.LayerStore, "save", save_or_stop)
    options = {"fine_tune": fine_tune, "run_directory": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        quantize(**options)
    assert not list(tmp_path.glob("*.tmp"))
    reports: dict[str, LayerReport] = {}
    resumed = quantize(**options, resume=True, reports=reports)
    assert redone == [0, 1]  # no finished layer is done again
    assert len(reports) == 14
    assert same(resumed, whole)


def test_the_whole_model_is_tuned_towards_the_original(
    quantize: Quantize,
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = EndToEndConfig(epochs=3, lr=3e-3, batch=2, held_out=0.25)
    seen: list[TuneReport] = []
    tune = ptq.tune_end_to_end

    def spy(*args: Any, **options: Any) -> TuneReport:
        seen.append(tune(*args, **options))
        return seen[-1]

    monkeypatch.setattr(ptq, "tune_end_to_end", spy)
    rough = {"inputs": "quantized"}  # leaves more to mend
    plain, tuned = quantize(rough), quantize(rough, end_to_end=config)
    assert seen[0].after < 0.9 * seen[0].before
    for name, layer in quantized_layers(plain).items():
        other = quantized_layers(tuned)[name]
        assert torch.equal(other.codes, layer.codes)
        assert other.in_scale is not None
    assert torch.equal(tuned.model.embed_tokens.weight, tiny_llama.model.embed_tokens.weight)
    assert not torch.equal(tuned.model.norm.weight, tiny_llama.model.norm.weight)

    save, epochs = ptq.LayerStore.save_tuning, []

    def save_or_stop(self: Any, epoch: int, *rest: Any) -> None:
        save(self, epoch, *rest)
        epochs.append(epoch)
        if epochs == [1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(ptq.LayerStore, "save_tuning", save_or_stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(rough, end_to_end=config, run_directory=tmp_path)
    resumed = quantize(rough, end_to_end=config, run_directory=tmp_path, resume=True)
    assert epochs == [1, 2, 3]
    assert same(resumed, tuned)


def test_tuning_spares_what_is_skipped(quantize: Quantize, tiny_llama: LlamaForCausalLM) -> None:
    model = quantize({"skip": ("q_proj",)}, fine_tune=TUNE)
    for layer, original in zip(model.model.layers, tiny_llama.model.layers, strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight, original.self_attn.q_proj.weight)
        assert not torch.equal(layer.input_layernorm.weight, original.input_layernorm.weight)


def test_tuning_the_whole_model_with_a_quantized_output_layer(
    quantize: Quantize, tmp_path: Path
) -> None:
    tuning = EndToEndConfig(epochs=1, batch=2)
    model = quantize({"head_bits": 4}, end_to_end=tuning, run_directory=tmp_path)
    resumed = quantize({"head_bits": 4}, end_to_end=tuning, run_directory=tmp_path, resume=True)
    assert same(model, resumed)
    codebooks = {layer.codebook.data_ptr() for layer in quantized_layers(model).values()}
    assert len(codebooks) == 2  # one of each code


def test_a_run_without_resume_starts_anew(quantize: Quantize, tmp_path: Path) -> None:
    quantize({"layers": ("0",)}, run_directory=tmp_path)
    again = quantize({"layers": ("0",), "seed": 5}, run_directory=tmp_path)
    assert same(again, quantize({"layers": ("0",), "seed": 5}))


def test_a_run_is_not_resumed_with_another_model(
    quantize: Quantize, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    quantize({"layers": ("0",)}, run_directory=tmp_path)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.down_proj.weight.neg_()
    with pytest.raises(ValueError, match="the interrupted run had weights="):
        quantize({"layers": ("0",)}, run_directory=tmp_path, resume=True)


def test_what_cannot_be_tuned_is_refused_at_once(quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs two calibration windows"):
        quantize({"windows": 1}, end_to_end=EndToEndConfig(), run_directory=tmp_path)
    assert not list(tmp_path.glob("quantize_state*"))


def test_half_precision_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    config = QuantizeConfig(code="gaussian", L=8, error_feedback=False)
    with pytest.raises(ValueError, match=r"convert it with model.float\(\)"):
        quantize_model(tiny_llama.bfloat16(), config)


def test_arguments_that_differ_between_windows() -> None:
    x = torch.arange(3)
    assert _alike({"a": (x, None), "b": 3}, {"a": (x.clone(), None), "b": 3})
    assert not _alike({"a": (x, None)}, {"a": (x + 1, None)})
    assert not _alike((x,), (x[:2],))
    assert not _alike({"a": x}, {"b": x})
    assert not _alike((None,), (x,))


def test_a_run_is_not_resumed_with_other_settings(quantize: Quantize, tmp_path: Path) -> None:
    quantize({"layers": ("0",)}, run_directory=tmp_path)
    with pytest.raises(ValueError, match="seed=0, this one has 1"):
        quantize({"layers": ("0",), "seed": 1}, run_directory=tmp_path, resume=True)
    damaged = tmp_path / "quantize_state_00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        quantize({"layers": ("0",)}, run_directory=tmp_path, resume=True)


def test_states_do_not_outlive_the_run(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_directory(tmp_path / "out") as partial:
            (partial / "quantize_state.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with whole_directory(tmp_path / "out", resume=True) as partial:
        assert (partial / "quantize_state.json").is_file()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must"),
        ({"lr": 0.0}, "lr must"),
        ({"scale_lr": -1.0}, "scale_lr must"),
        ({"held_out": 1.0}, "held_out must"),
    ],
)
def test_tuning_that_makes_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuneConfig(**change)
