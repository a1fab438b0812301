"""Quantizing progressively."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.support import same
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from softtrellis.cli.common import UsageError
from softtrellis.cli.main import build_parser
from softtrellis.cli.quantize import configs
from softtrellis.evaluation.perplexity import score_many
from softtrellis.io.sources import load_source
from softtrellis.io.text import load_documents, token_windows
from softtrellis.recipes.estimate import estimate
from softtrellis.recipes.finetune import FineTuneConfig
from softtrellis.recipes.progressive import Progressive, ProgressiveConfig
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

STEPS = ProgressiveConfig(steps=6, lr=3e-2, batch=4, warmup=1)
LAYERS = 3


def letters(count: int, *, seed: int) -> str:
    drawn = torch.randint(26, (count,), generator=torch.Generator().manual_seed(seed))
    return "".join(chr(97 + int(i)) for i in drawn)


class Setting:
    """A tiny model of three decoder layers, and its text."""

    def __init__(self, teacher: LlamaForCausalLM, tokenizer: Any, text: Path) -> None:
        self.teacher, self.tokenizer, self.text = teacher, tokenizer, str(text)

    def config(self, **change: Any) -> QuantizeConfig:
        rough = {"code": "gaussian", "L": 6, "ctx": 32, "windows": 16, "data": (self.text,)}
        return QuantizeConfig(**(rough | change))

    def quantize(self, config: QuantizeConfig | None = None, **options: Any) -> LlamaForCausalLM:
        model = copy.deepcopy(self.teacher)
        config = config or self.config()
        quantized = quantize_model(model, config, tokenizer=self.tokenizer, **options)
        assert isinstance(quantized, LlamaForCausalLM)
        return quantized

    def divergence(self, model: LlamaForCausalLM) -> float:
        text = load_documents([self.text], split="calibration")
        windows = token_windows(self.tokenizer, text, 32)[:16]
        scores = score_many({"teacher": self.teacher, "model": model}, windows, "teacher")
        found = scores["model"].kl_mean
        assert found is not None
        return found


@pytest.fixture
def setting(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Setting:
    settings = copy.deepcopy(tiny_llama.config)
    settings.num_hidden_layers = LAYERS
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(settings).eval()
    text = tmp_path / "text.txt"
    text.write_text(letters(600, seed=0), encoding="utf-8")
    return Setting(teacher, tiny_tokenizer, text)


def test_what_is_behind_learns_to_make_up_for_what_is_quantized(setting: Setting) -> None:
    """On the text that it is trained on; a random model has little more to learn from."""
    progressive = setting.quantize(progressive=replace(STEPS, steps=20, batch=16))
    assert setting.divergence(progressive) < 0.8 * setting.divergence(setting.quantize())
    for name, value in setting.teacher.state_dict().items():
        if "layers" not in name:
            assert torch.equal(value, progressive.state_dict()[name]), name
    assert all(p.grad is None for p in progressive.parameters())


def test_a_real_model_stays_nearer_to_itself(stories260k: Path, shared_data: Path) -> None:
    source = load_source(str(stories260k))
    text = str(shared_data / "tinystories.txt")
    stories = Path(text).read_text(encoding="utf-8")
    held_out = token_windows(source.tokenizer, [stories[-20000:]], 128)
    found = []
    for progressive in (None, ProgressiveConfig(steps=12, lr=6e-2)):
        config = QuantizeConfig(code="gaussian", L=6, ctx=128, windows=256, data=(text,))
        model = copy.deepcopy(source.model)
        quantize_model(model, config, tokenizer=source.tokenizer, progressive=progressive)
        models = {"teacher": source.model, "model": model}
        found.append(score_many(models, held_out, "teacher", batch_size=16)["model"].kl_mean or 9.9)
    assert found[1] < 0.8 * found[0]


def test_with_fine_tuning_and_text_of_its_own(setting: Setting) -> None:
    config = ProgressiveConfig(steps=2, batch=3, micro_batch=2, data=(setting.text,), ctx=16)
    tuned = setting.quantize(progressive=config, fine_tune=FineTuneConfig(epochs=1))
    whole = ProgressiveConfig(steps=2, batch=3, data=(setting.text,), ctx=16)
    other = setting.quantize(progressive=whole, fine_tune=FineTuneConfig(epochs=1))
    assert setting.divergence(tuned) == pytest.approx(setting.divergence(other), rel=0.02)


def test_text_that_later_chooses_a_step_is_not_seen(setting: Setting, tmp_path: Path) -> None:
    """A tenth of the documents, the last ones, which training on the same text holds out."""
    path = tmp_path / "documents.txt"
    config = replace(STEPS, steps=2, batch=16, data=(f"documents:{path}",), ctx=16)

    def quantized(*, before_last: int, last: int) -> LlamaForCausalLM:
        seeds = [*range(17), before_last, last, last + 1]
        path.write_text("\n\n".join(letters(40, seed=seed) for seed in seeds), encoding="utf-8")
        return setting.quantize(progressive=config)

    model = quantized(before_last=17, last=18)
    assert same(model, quantized(before_last=17, last=20))
    assert not same(model, quantized(before_last=20, last=18))


def test_only_what_will_be_quantized_changes(setting: Setting) -> None:
    config = setting.config(skip=("q_proj",), layers=("0-1",))
    model = setting.quantize(config, progressive=STEPS)
    for layer, original in zip(model.model.layers, setting.teacher.model.layers, strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight, original.self_attn.q_proj.weight)
    last, original = model.model.layers[-1], setting.teacher.model.layers[-1]
    assert torch.equal(last.mlp.up_proj.weight, original.mlp.up_proj.weight)
    assert not torch.equal(last.input_layernorm.weight, original.input_layernorm.weight)


def test_compiled_layers_change_nothing(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = setting.quantize(progressive=replace(STEPS, compile=True))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 3, "the teacher's layers, and those behind, of which the first has no gradient"
    assert same(compiled, setting.quantize(progressive=STEPS))


@pytest.mark.parametrize("stop", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, when: str
) -> None:
    whole = setting.quantize(progressive=STEPS)
    train, trained = Progressive._train, []

    def train_or_stop(self: Progressive, index: int, parameters: Any) -> None:
        if when == "before" and index == stop and stop not in trained:
            trained.append(index)
            raise KeyboardInterrupt
        train(self, index, parameters)
        trained.append(index)

    after = Progressive.after

    def after_or_stop(self: Progressive, index: int) -> None:
        after(self, index)
        if (
            when == "after"
            and index == stop
            and trained.count(stop) == 1
            and len(trained) <= stop + 1
        ):
            monkeypatch.setattr(Progressive, "after", after)
            raise KeyboardInterrupt

    monkeypatch.setattr(Progressive, "_train", train_or_stop)
    monkeypatch.setattr(Progressive, "after", after_or_stop)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(KeyboardInterrupt):
        setting.quantize(progressive=STEPS, run_directory=run)
    resumed = setting.quantize(progressive=STEPS, run_directory=run, resume=True)
    assert trained == [*range(stop + 1), *range(stop + (when == "after"), LAYERS - 1)]
    assert same(whole, resumed)


def test_a_damaged_state_is_refused(setting: Setting, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    setting.quantize(progressive=STEPS, run_directory=run)
    (run / "quantize_state_rest.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is damaged"):
        setting.quantize(progressive=STEPS, run_directory=run, resume=True)


def test_a_rate_that_is_too_large_is_named(setting: Setting) -> None:
    with pytest.raises(ValueError, match=r"behind decoder layer \d; lower the lr"):
        setting.quantize(progressive=ProgressiveConfig(steps=30, lr=1e30, batch=4))


def test_it_needs_hessians(setting: Setting) -> None:
    with pytest.raises(ValueError, match="needs Hessians: error_feedback"):
        setting.quantize(setting.config(error_feedback=False), progressive=STEPS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"ctx": 1}, "ctx must be at least 2"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgressiveConfig(**change)


def test_options_of_the_command() -> None:
    words = ["quantize", "m", "-o", "d", "--progressive", "8", "--progressive-data", "a", "b"]
    _, _, progressive, _ = configs(build_parser().parse_args([*words, "--seed", "3"]))
    assert progressive == ProgressiveConfig(steps=8, data=("a", "b"), seed=3)
    with pytest.raises(UsageError, match="--progressive-lr needs --progressive"):
        configs(build_parser().parse_args(["quantize", "m", "-o", "d", "--progressive-lr", "1"]))


def test_it_is_in_the_estimate(setting: Setting) -> None:
    config = setting.config()
    plain, more = (estimate(setting.teacher, config, None, p) for p in (None, STEPS))
    assert more.tune_seconds > plain.tune_seconds == 0
    assert more.device_bytes > plain.device_bytes
