"""LoRA on quantized layers: gradients, memory, training, and adapters on disk."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from softtrellis.modules.replace import dequantize_, quantized_layers
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

pytest.importorskip("peft", reason="needs peft (.venv/bin/pip install -e '.[lora]')")

from peft import LoraConfig, get_peft_model

from softtrellis.integrations.peft import (
    LoraQuantizedLinear,
    add_lora,
    load_lora,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

IDS = torch.arange(3, 35).reshape(2, 16)


def packed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    config = QuantizeConfig(code="gaussian", L=8, layers=None, error_feedback=False)
    quantize_model(model, config)
    return model


@pytest.fixture
def model(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """`tiny_llama` with all layers quantized."""
    return packed(tiny_llama)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)


def steps(model: Any, count: int, lr: float = 0.02) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    losses = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_new_adapter_changes_nothing_and_trains_alone(model: LlamaForCausalLM) -> None:
    before = model(IDS).logits
    adapted = add_lora(model, lora())
    assert torch.equal(adapted(IDS).logits, before)
    assert sum(isinstance(m, LoraQuantizedLinear) for m in adapted.modules()) == 14
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dense_model(
    model: LlamaForCausalLM, checkpointing: bool
) -> None:
    import copy

    dense = copy.deepcopy(model)
    dequantize_(dense)
    targets = sorted(quantized_layers(model))
    a = add_lora(model, lora())
    b = get_peft_model(dense, lora(target_modules=targets))
    with torch.no_grad():
        for (name, p), (other, q) in zip(lora_of(a), lora_of(b), strict=True):
            assert name == other
            q.copy_(p.normal_(std=0.1))
    if checkpointing:
        a.enable_input_require_grads()
        a.gradient_checkpointing_enable()
        a.train()
    for each in (a, b):
        each(input_ids=IDS, labels=IDS).loss.backward()
    for (_, p), (_, q) in zip(lora_of(a), lora_of(b), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def lora_of(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)


def test_decoded_weights_are_not_kept_for_the_backward_pass(model: LlamaForCausalLM) -> None:
    adapted = add_lora(model, lora())
    shapes = {(m.out_features, m.in_features) for m in quantized_layers(adapted).values()}
    shapes |= {shape[::-1] for shape in shapes}
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = adapted(input_ids=IDS[:, :15], labels=IDS[:, :15]).loss  # 30 tokens: no layer's size
    assert kept
    assert not shapes & set(kept)
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_lowers_the_loss_and_leaves_the_codes(
    model: LlamaForCausalLM, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    before = {name: layer.weight() for name, layer in quantized_layers(model).items()}
    adapted = add_lora(model, lora(), dtype=dtype)
    assert {p.dtype for _, p in lora_of(adapted)} == {dtype}
    losses = steps(adapted, 12)
    assert losses[-1] < losses[0] - 0.5
    after = quantized_layers(adapted.base_model.model)
    for name, weight in before.items():
        assert torch.equal(after[f"{name}.base_layer"].weight(), weight)


def test_adapters_in_float32_on_a_bfloat16_model(model: LlamaForCausalLM) -> None:
    adapted = add_lora(model.to(torch.bfloat16), lora())
    assert adapted(IDS).logits.dtype == torch.bfloat16
    assert {p.dtype for _, p in lora_of(adapted)} == {torch.float32}
    assert steps(adapted, 6)[-1] < steps(adapted, 1)[0] + 1.0


def test_loaded_adapters_in_another_dtype(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    import copy

    model = packed(tiny_llama).to(torch.bfloat16)
    other, exact = copy.deepcopy(model), copy.deepcopy(model)
    adapted = add_lora(model, lora())
    steps(adapted, 1)
    adapted.save_pretrained(tmp_path)
    for fresh, options, dtype in (
        (exact, {}, torch.float32),
        (other, {"dtype": torch.bfloat16}, torch.bfloat16),
    ):
        loaded = load_lora(fresh, tmp_path, **options)
        for (_, found), (_, saved) in zip(lora_of(loaded), lora_of(adapted), strict=True):
            assert torch.equal(found, saved.to(dtype))
            assert found.dtype == dtype


def test_the_second_moment_of_adamw_does_not_decay_in_bfloat16() -> None:
    """Why adapters on a bfloat16 model are float32 by default."""
    moments = []
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = torch.optim.AdamW([parameter])
        for gradient in [1.0] + 1000 * [0.0]:
            parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
        moments.append(float(optimizer.state[parameter]["exp_avg_sq"][0]) / 0.001)
    assert moments[0] < 0.4
    assert moments[1] > 0.99


def test_saved_and_loaded(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    import copy

    model = packed(tiny_llama)
    fresh, again = copy.deepcopy(model), copy.deepcopy(model)
    adapted = add_lora(model, lora(target_modules=["q_proj", "down_proj"]))
    steps(adapted, 4)
    adapted.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    loaded = load_lora(fresh, tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, adapted(IDS).logits)
    assert not [p for p in loaded.parameters() if p.requires_grad]
    with loaded.disable_adapter():
        assert not torch.equal(loaded(IDS).logits, adapted(IDS).logits)
    further = load_lora(again, tmp_path / "adapter", trainable=True)
    assert len([p for p in further.parameters() if p.requires_grad]) == 8
    steps(further, 1)


@pytest.mark.gpu
def test_training_on_a_gpu(model: LlamaForCausalLM) -> None:
    ids = IDS.cuda()
    adapted = add_lora(model.to("cuda", torch.bfloat16), lora(), dtype=torch.bfloat16)
    assert {p.device.type for _, p in lora_of(adapted)} == {"cuda"}
    optimizer = torch.optim.AdamW([p for _, p in lora_of(adapted)], lr=0.02)
    losses = []
    for _ in range(12):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_generation_with_adapters(model: LlamaForCausalLM) -> None:
    adapted = add_lora(model, lora())
    steps(adapted, 4)
    tokens = adapted.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 20)


def test_all_linear_layers(tiny_llama: LlamaForCausalLM) -> None:
    config = QuantizeConfig(code="gaussian", L=8, layers=("0",), error_feedback=False)
    quantize_model(tiny_llama, config)
    adapted = add_lora(tiny_llama, lora(target_modules="all-linear"))
    adapters = {name.split(".lora_")[0] for name, _ in lora_of(adapted)}
    assert len(adapters) == 14
    assert sum(isinstance(m, LoraQuantizedLinear) for m in adapted.modules()) == 7


def test_an_adapter_for_every_row(model: LlamaForCausalLM) -> None:
    from softtrellis.integrations.peft import register

    adapted = add_lora(model, lora()).eval()
    adapted.add_adapter("other", register(lora(target_modules=["q_proj"])))
    with torch.no_grad():
        for _, parameter in lora_of(adapted):
            parameter.normal_(std=0.1)
        found = adapted(input_ids=IDS, adapter_names=["other", "__base__"]).logits
        adapted.set_adapter("other")
        expected = adapted(input_ids=IDS).logits[0]
        with adapted.disable_adapter():
            base = adapted(input_ids=IDS).logits[1]
    torch.testing.assert_close(found, torch.stack([expected, base]))


def test_the_trainer_of_transformers(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """It refuses models of quantizers that do not say that they are trainable."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    import softtrellis.integrations.transformers  # noqa: F401
    from softtrellis.io.checkpoint import BaseModel, save_quantized

    (folder := tmp_path / "checkpoint").mkdir()
    save_quantized(model, tiny_tokenizer, folder, base=BaseModel("tiny", "0" * 64, "mit"))
    adapted = add_lora(AutoModelForCausalLM.from_pretrained(folder), lora())
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.02, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    trainer = Trainer(adapted, settings, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    again = load_lora(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, adapted.eval()(IDS).logits)


def test_a_packed_model_is_not_saved_with_adapters_on_it(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    import softtrellis.integrations.transformers  # noqa: F401
    from softtrellis.io.checkpoint import BaseModel, save_quantized

    base = BaseModel("tiny", "0" * 64, "mit")
    for folder in ("checkpoint", "other"):
        (tmp_path / folder).mkdir()
    save_quantized(model, tiny_tokenizer, tmp_path / "checkpoint", base=base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    expected = loaded(IDS).logits
    adapted = add_lora(loaded, lora())
    steps(adapted, 1)
    with pytest.raises(ValueError, match="save_pretrained of peft's model"):
        adapted.base_model.model.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="save_pretrained of peft's model"):
        save_quantized(adapted.base_model.model, tiny_tokenizer, tmp_path / "other", base=base)
    assert not list((tmp_path / "other").iterdir())
    adapted.unload().save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, expected)


def test_adapters_through_transformers_need_to_be_registered(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Documented in docs/huggingface.md."""
    import copy

    from softtrellis.integrations.peft import register

    packed_model, adapted = copy.deepcopy(model), add_lora(model, lora())
    steps(adapted, 1)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"QuantizedLinear.* is not supported"):
        copy.deepcopy(packed_model).load_adapter(str(tmp_path))
    config = register(LoraConfig.from_pretrained(str(tmp_path)))
    packed_model.load_adapter(str(tmp_path), peft_config=config)
    assert torch.equal(packed_model(IDS).logits, adapted(IDS).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"use_dora": True}, "use_dora"), ({"init_lora_weights": "pissa"}, "init_lora_weights")],
)
def test_what_needs_a_dense_weight_is_refused(
    model: LlamaForCausalLM, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(model, lora(**settings))


def test_merging_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        add_lora(model, lora()).merge_and_unload()


def test_a_dense_model_is_refused(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no quantized layer"):
        add_lora(tiny_llama, lora())
    get_peft_model(tiny_llama, lora(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no quantized layer"):
        load_lora(tiny_llama, tmp_path)


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lora.py"


def test_the_example_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = tmp_path / "nothere"
    monkeypatch.setattr("sys.argv", ["lora.py", str(nothing), str(tmp_path / "adapter")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{nothing} is not a softtrellis checkpoint: there is no such directory" in last


def test_the_example(
    tiny_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from softtrellis.io.checkpoint import base_of, save_quantized
    from softtrellis.io.sources import load_source

    source = load_source(str(tiny_directory))
    base = base_of(source)
    (tmp_path / "checkpoint").mkdir()
    model = packed(source.model)
    save_quantized(model, source.tokenizer, tmp_path / "checkpoint", base=base)
    options = "--steps 8 --lr 0.01 --ctx 64 --windows 4"
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "adapter"), *options.split()]
    monkeypatch.setattr("sys.argv", ["lora.py", *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    before, after = map(float, re.findall(r"[\d.]+\d", last))
    assert after < before
