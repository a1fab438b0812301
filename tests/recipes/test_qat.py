"""Training through the trellis."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from softtrellis.evaluation.perplexity import score_windows
from softtrellis.io.checkpoint import save_quantized
from softtrellis.io.manifest import BaseModel
from softtrellis.io.sources import fingerprint
from softtrellis.io.text import load_documents, token_windows
from softtrellis.modules.replace import quantized_layers
from softtrellis.recipes.drift import rate_of_walk
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.qat import DistillConfig, distill
from softtrellis.recipes.stages import Run

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture
def text(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (6000,), generator=generator)
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, letters.tolist())), encoding="utf-8")
    return str(path)


class Setting:
    """A tiny teacher, its quantized student, and a way to train it."""

    def __init__(self, teacher: Any, tokenizer: Any, text: str) -> None:
        self.teacher, self.tokenizer, self.text = teacher, tokenizer, text
        quantizer = {"code": "gaussian", "L": 6, "inputs": "quantized"}  # leaves more to mend
        config = QuantizeConfig(data=(text,), ctx=64, windows=16, **quantizer)  # type: ignore[arg-type]
        self.student = quantize_model(copy.deepcopy(teacher), config, tokenizer=tokenizer)

    def train(self, directory: Path | None = None, *, resume: bool = False, **change: Any) -> Any:
        settings = {"steps": 6, "batch": 2, "ctx": 64, "measure_every": 3, "lr": 3e-2}
        settings |= {"estimator": "soft", "start": 0.0} | change
        config = DistillConfig(data=(self.text,), **settings)
        return distill(
            copy.deepcopy(self.student),
            config,
            teacher=self.teacher,
            tokenizer=self.tokenizer,
            run_directory=directory,
            resume=resume,
        )

    def codes(self, model: Any) -> dict[str, torch.Tensor]:
        return {name: layer.codes for name, layer in quantized_layers(model).items()}


@pytest.fixture
def setting(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, text: str
) -> Setting:
    return Setting(tiny_llama, tiny_tokenizer, text)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_thirty_steps_lower_the_hardened_divergence(setting: Setting) -> None:
    windows = token_windows(
        setting.tokenizer, load_documents([setting.text], split="heldout"), 64, limit=24
    )
    before = score_windows(setting.student, windows, reference=setting.teacher).kl_mean
    result = setting.train(steps=30, batch=4, lr=5e-2)
    after = score_windows(result.model, windows, reference=setting.teacher).kl_mean
    assert before is not None
    assert after is not None
    assert after < 0.8 * before
    assert all(0 < share < 1 for share in result.changed_codes.values())
    assert result.history[-1]["temperature"] == pytest.approx(0.03)


def test_log_has_a_record_per_step(setting: Setting, tmp_path: Path) -> None:
    result = setting.train(tmp_path)
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert [record["step"] for record in result.history] == list(range(6))
    measured = [record["step"] for record in result.history if "drift" in record]
    assert measured == [0, 3, 5]
    last = result.history[-1]
    assert last["drift"] > 0
    assert set(last["layers"]) == set(setting.codes(setting.student))


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("joint", {}),
        ("greedy", {}),
        ("joint", {"estimator": "identity", "viterbi_every": 3}),
        ("joint", {"estimator": "mixed", "bcjr_stride": 3}),
    ],
)
def test_resuming_gives_the_weights_of_an_uninterrupted_run(
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    more: dict[str, Any],
) -> None:
    from softtrellis.recipes import trainer

    change = {"mode": mode, "save_every": 2, "reencode_every": 3, "measure_every": 0, "lr": 0.2}
    change |= more
    result = setting.train(**change)
    whole, start = setting.codes(result.model), setting.codes(setting.student)
    assert not any(torch.equal(whole[name], start[name]) for name in start)
    for stage, best in enumerate(result.kept):
        records = [record for record in result.history if record["stage"] == stage]
        assert best is not None
        assert best[1] < records[0]["heldout_kl_start"]
    original, calls = trainer.Trainer.step, 0
    stop_at = 5 if mode == "joint" else 9

    def step(self: Any, number: int, share: float) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls > stop_at:
            raise KeyboardInterrupt
        return original(self, number, share)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            setting.train(tmp_path, **change)
    resumed = setting.train(tmp_path, resume=True, **change)
    assert same(setting.codes(resumed.model), whole)
    steps = [record["step"] for record in resumed.history]
    assert steps == list(range(6 if mode == "joint" else 12))


def test_resuming_with_other_settings_is_refused(setting: Setting, tmp_path: Path) -> None:
    setting.train(tmp_path, save_every=2)
    with pytest.raises(ValueError, match=r"lr=0\.03.*0\.01"):
        setting.train(tmp_path, resume=True, save_every=2, lr=1e-2)


@pytest.mark.parametrize("estimator", ["soft", "straight_through", "mixed", "identity"])
def test_estimators_train(setting: Setting, estimator: str) -> None:
    result = setting.train(estimator=estimator)
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in result.history)
    assert setting.codes(result.model).keys() == setting.codes(setting.student).keys()
    assert result.history[-1]["drift"] > result.history[0]["drift"] > 0


def test_tiles_have_their_turn_by_step(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from softtrellis.modules import latent_stacks

    estimate, turns = latent_stacks.estimate, list[int]()

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        assert options["bcjr_stride"] == 3
        turns.append(options["turn"])
        return estimate(*args, **options)

    monkeypatch.setattr(latent_stacks, "estimate", watched)
    setting.train(estimator="mixed", bcjr_stride=3, evaluate_every=0, steps=5)
    assert list(dict.fromkeys(turns)) == [0, 1, 2, 3, 4]


def test_only_the_chosen_layers_are_trained(setting: Setting) -> None:
    result = setting.train(layers=("1.mlp.up_proj",), lr=0.3, steps=8)
    before, after = setting.codes(setting.student), setting.codes(result.model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.mlp.up_proj"]


def test_automatic_start_is_twice_the_quantization_error(setting: Setting) -> None:
    result = setting.train(t_init="auto", steps=2, measure_every=0)
    assert 0.05 < result.history[0]["temperature"] < 0.5


def test_mode_single_trains_the_named_layers_together(setting: Setting) -> None:
    change = {"layers": ("0.mlp.up_proj", "1.self_attn.q_proj"), "lr": 0.3}
    result = setting.train(mode="single", **change)
    before, after = setting.codes(setting.student), setting.codes(result.model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    assert len(result.history) == 6
    assert same(after, setting.codes(setting.train(mode="joint", **change).model))


def test_models_without_quantized_layers(setting: Setting) -> None:
    with pytest.raises(ValueError, match="no quantized layers"):
        distill(
            setting.teacher,
            DistillConfig(data=(setting.text,)),
            teacher=setting.teacher,
            tokenizer=setting.tokenizer,
        )


def test_the_defaults_lower_the_hardened_divergence(setting: Setting) -> None:
    """Identity STE from half of the way to the original weights, at the rate of a walk."""
    windows = token_windows(
        setting.tokenizer, load_documents([setting.text], split="heldout"), 64, limit=24
    )
    before = score_windows(setting.student, windows, reference=setting.teacher).kl_mean
    config = DistillConfig(data=(setting.text,), ctx=64, steps=60)
    result = distill(
        copy.deepcopy(setting.student), config, teacher=setting.teacher, tokenizer=setting.tokenizer
    )
    after = score_windows(result.model, windows, reference=setting.teacher).kl_mean
    assert before is not None
    assert after is not None
    assert after < 0.8 * before
    assert max(record["lr"] for record in result.history) == pytest.approx(
        rate_of_walk(60), rel=0.05
    )


@pytest.mark.parametrize(
    ("provenance", "given", "expected"),
    [
        ({"quantize": {}, "train": {}}, {}, 0.25),
        ({"quantize": {}, "fine_tune": {}}, {}, 0.25),
        ({"quantize": {}, "train": {}}, {"start": 0.75}, 0.75),
        (None, {}, 0.5),
    ],
)
def test_where_latents_of_a_checkpoint_start(
    setting: Setting,
    tmp_path: Path,
    provenance: dict[str, Any] | None,
    given: dict[str, Any],
    expected: float,
) -> None:
    """As in the command, whose test is in ``tests/cli/test_workflow.py``; None is a loaded one."""
    model: Any = setting.student
    if provenance is not None:
        model, base = tmp_path / "checkpoint", BaseModel("tiny", fingerprint(setting.teacher))
        model.mkdir()
        save_quantized(setting.student, setting.tokenizer, model, base=base, provenance=provenance)
    starts = []
    train = Run.train

    def spy(self: Run, stages: Any) -> Any:
        starts.append(self.config.start)
        return train(self, stages)

    config = DistillConfig(data=(setting.text,), ctx=64, steps=1, batch=1, held_out=0, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train", spy)
        distill(model, config, teacher=setting.teacher, tokenizer=setting.tokenizer)
    assert starts == [expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t_init": 0.0}, "t_init must be a positive number"),
        ({"t_min": -0.1}, "t_min must be a positive number"),
        ({"t_init": "hot"}, "t_init must be a positive number"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"mode": "all"}, "unknown mode"),
        ({"mode": "single"}, "layers must name some layers in mode 'single'"),
        ({"viterbi_every": 4, "estimator": "soft"}, "viterbi_every must be left out where"),
        ({"estimator": "hard"}, "unknown estimator"),
        ({"schedule": "linear"}, "unknown schedule"),
        ({"save_every": -1}, "save_every must be 0"),
        ({"start": 1.5}, "start must lie between 0 and 1, got 1.5"),
        ({"start": "far"}, "start must lie between 0 and 1, got 'far'"),
    ],
)
def test_configs_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**change)
