"""What a run may train, how it ends, and which code it keeps."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from softtrellis.evaluation.perplexity import score_windows
from softtrellis.io.checkpoint import base_of, load_quantized, save_quantized
from softtrellis.io.sources import Source
from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import get_linear, quantized_layers
from softtrellis.recipes import objective, schedules, stages, trainer
from softtrellis.recipes.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.qat import DistillConfig, distill
from softtrellis.recipes.stages import DistillResult

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EVERYTHING = ("latents", "scales", "norms", "table")


class Setting:
    """A tiny teacher, its student in a 2-bit code, and a way to train it."""

    def __init__(self, teacher: Any, tokenizer: Any, text: str) -> None:
        self.teacher, self.tokenizer, self.text = teacher, tokenizer, text

    def student(self, code: str = "gaussian", L: int = 6) -> Any:
        """Rough, so that there is much to mend."""
        rough = {"inputs": "quantized", "code": code, "L": L, "ctx": 64, "windows": 16}
        config = QuantizeConfig(data=(self.text,), **rough)  # type: ignore[arg-type]
        return quantize_model(copy.deepcopy(self.teacher), config, tokenizer=self.tokenizer)

    def train(self, student: Any, directory: Path | None = None, **change: Any) -> DistillResult:
        settings = {"steps": 6, "batch": 4, "ctx": 64, "measure_every": 0, "lr": 3e-2} | change
        resume = settings.pop("resume", False)
        return distill(
            copy.deepcopy(student),
            DistillConfig(data=(self.text,), **settings),
            teacher=self.teacher,
            tokenizer=self.tokenizer,
            run_directory=directory,
            resume=resume,
        )


@pytest.fixture
def setting(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> Setting:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (6000,), generator=generator)
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, letters.tolist())), encoding="utf-8")
    return Setting(tiny_llama, tiny_tokenizer, str(path))


def losses(result: DistillResult) -> list[float]:
    return [record["loss"] for record in result.history]


def same(a: Any, b: Any) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_passes_in_parts_and_recomputed_ones_change_nothing(setting: Setting) -> None:
    student = setting.student()
    whole = losses(setting.train(student))
    assert whole[-1] < whole[0]
    for change in ({"micro_batch": 3}, {"checkpoint_layers": True}):
        assert losses(setting.train(student, **change)) == pytest.approx(whole, rel=1e-3)


def test_all_that_can_be_trained_is_saved_with_the_model(setting: Setting, tmp_path: Path) -> None:
    student = setting.student("hyb", 10)
    result = setting.train(
        student, train=EVERYTHING, steps=8, scale_lr=1e-2, table_lr=1e-2, held_out=0
    )
    before, after = student.state_dict(), result.model.state_dict()
    norms = [name for name in before if name.endswith("norm.weight")]
    assert len(norms) == 5
    assert not any(torch.equal(before[name], after[name]) for name in norms)
    layers = quantized_layers(result.model)
    first, *others = layers.values()
    assert not torch.equal(first.codebook, next(iter(quantized_layers(student).values())).codebook)
    assert all(layer.codebook is first.codebook for layer in others)
    for layer in layers.values():
        assert layer.in_scale is not None
        assert layer.out_scale is not None
        assert not torch.equal(layer.in_scale, torch.ones_like(layer.in_scale))
        assert not torch.equal(layer.out_scale, torch.ones_like(layer.out_scale))
    assert losses(result)[-1] < losses(result)[0]

    folder = tmp_path / "saved"
    folder.mkdir()
    base = base_of(Source("tiny", setting.teacher, setting.tokenizer, None, "mit"))
    save_quantized(result.model, setting.tokenizer, folder, base=base)
    ids = torch.randint(128, (2, 16))
    with torch.no_grad():
        assert torch.equal(load_quantized(folder)(ids).logits, result.model(ids).logits)


@pytest.mark.parametrize("parts", [("scales",), ("norms",), ("table",)])
def test_codes_stay_where_latents_are_not_trained(setting: Setting, parts: tuple[str, ...]) -> None:
    student = setting.student("hyb", 10)
    result = setting.train(student, train=parts, scale_lr=1e-2, table_lr=1e-2, held_out=0)
    assert losses(result)[-1] < losses(result)[0]
    if parts != ("table",):  # other codewords can have other nearest paths
        assert set(result.changed_codes.values()) == {0.0}


def test_a_table_is_trained_with_all_that_share_it(setting: Setting) -> None:
    student = setting.student("hyb", 10)
    with pytest.raises(ValueError, match="share it"):
        setting.train(student, train=("table",), layers=("1",))
    with pytest.raises(ValueError, match="no table"):
        setting.train(setting.student(), train=("table",))


def test_the_best_step_on_held_out_text_is_kept(setting: Setting) -> None:
    student = setting.student()
    result = setting.train(student, lr=0.3, steps=12, evaluate_every=1, held_out=4)
    measured = [record["heldout_kl_hard"] for record in result.history]
    kept = result.kept[0]
    assert kept is not None
    assert kept[1] == min(measured) < result.history[0]["heldout_kl_start"]
    assert min(result.changed_codes.values()) > 0
    assert kept[0] == measured.index(min(measured)) < 11  # such a rate spoils the end
    from softtrellis.io.text import train_and_held_out_windows

    _, held_out = train_and_held_out_windows(
        setting.tokenizer, (setting.text,), 64, held_out_windows=4
    )
    found = score_windows(result.model, held_out, reference=setting.teacher).kl_mean
    assert found == pytest.approx(kept[1], rel=1e-3)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_training_that_only_harms_keeps_what_it_started_from(
    setting: Setting, start: float
) -> None:
    student = setting.student()
    change = {"lr": 30.0, "steps": 3, "evaluate_every": 1, "start": start}
    result = setting.train(student, held_out=4, **change)
    divergence = result.history[0]["heldout_kl_start"]
    assert min(record["heldout_kl_hard"] for record in result.history) > divergence
    assert result.kept == [(trainer.START, divergence)]
    assert set(result.changed_codes.values()) == {0.0}
    assert same(result.model, student)
    unseen = setting.train(student, held_out=0, **change)
    assert "heldout_kl_start" not in unseen.history[0]
    assert unseen.kept == [None]
    assert not same(unseen.model, student)


def test_the_start_is_evaluated_in_one_pass(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, original = [0], trainer.Trainer._divergence

    def counted(self: Any) -> float:
        passes[0] += 1
        return original(self)

    monkeypatch.setattr(trainer.Trainer, "_divergence", counted)
    for held_out, expected in ((4, 1 + 2), (0, 0)):  # of the last step two: soft and hard
        passes[0] = 0
        setting.train(setting.student(), steps=2, held_out=held_out)
        assert passes[0] == expected


def test_a_step_without_a_finite_divergence_is_not_kept(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    hard = [float("nan"), 0.5, float("inf"), 0.7]
    answers = [0.6]  # of the start
    answers += [answer for value in hard for answer in (0.1, value)]  # as trained, and hardened
    monkeypatch.setattr(trainer.Trainer, "_divergence", lambda _: answers.pop(0))
    result = setting.train(setting.student(), steps=4, evaluate_every=1, held_out=4)
    assert result.kept == [(1, 0.5)]


@pytest.mark.parametrize(("lr", "best"), [(0.5, 0), (30.0, trainer.START)])
def test_an_interrupted_run_keeps_the_best_step(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: float, best: int
) -> None:
    """Of steps before the state was saved, which it holds."""
    student = setting.student("hyb", 10)
    change = {"train": EVERYTHING, "lr": lr, "evaluate_every": 1, "held_out": 4, "save_every": 3}
    whole = setting.train(student, steps=7, **change)
    assert whole.kept[0] is not None
    assert whole.kept[0][0] == best
    assert (max(whole.changed_codes.values()) > 0) == (best != trainer.START)
    original, calls = trainer.Trainer.step, 0

    def step(self: Any, number: int, share: float) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        return original(self, number, share)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            setting.train(student, tmp_path, steps=7, **change)
    resumed = setting.train(student, tmp_path, steps=7, resume=True, **change)
    assert [record["step"] for record in resumed.history] == list(range(7))
    assert losses(resumed) == losses(whole)
    assert resumed.kept == whole.kept
    assert same(resumed.model, whole.model)


def test_latents_can_start_at_the_original_weights(setting: Setting) -> None:
    student = setting.student()
    starts: dict[float, LatentLinear] = {}
    original = trainer.Trainer.harden

    def spy(self: Any) -> dict[str, float]:
        starts[self.config.start] = next(iter(self.layers.values()))
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "harden", spy)
        for start in (0.0, 0.5, 1.0):
            setting.train(student, start=start, steps=1, lr=1e-12)
    name = next(iter(quantized_layers(student)))
    weight = get_linear(setting.teacher, name).weight
    whole = starts[1.0]
    torch.testing.assert_close(whole.basis.to_weight(whole.latent), weight, atol=1e-5, rtol=1e-4)
    between = (starts[0.0].latent + whole.latent) / 2
    torch.testing.assert_close(starts[0.5].latent, between)


def test_another_estimator_finishes_the_run(setting: Setting) -> None:
    seen: list[str] = []
    original = trainer.hold

    def spy(layers: Any) -> None:
        seen.append(next(iter(layers)).estimator)
        original(layers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "hold", spy)
        setting.train(
            setting.student(), steps=5, finish="identity", finish_share=0.3, evaluate_every=0
        )
    assert seen == ["soft", "soft", "soft", "identity", "identity"]


def test_a_run_by_the_clock_ends_its_schedules(setting: Setting) -> None:
    result = setting.train(setting.student(), steps=None, minutes=0.05, evaluate_every=0)
    last = result.history[-1]
    assert last["share"] == 1.0
    assert last["temperature"] == pytest.approx(0.03)
    ends = [record["seconds"] for record in result.history]
    longest = max(end - start for start, end in pairwise([0.0, *ends]))
    assert 3.0 - 3 * longest < ends[-1] < 3.0 + 2 * longest


@pytest.fixture
def ten_seconds_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs only while steps are taken."""
    now, original = [0.0], trainer.Trainer.step

    def step(self: Any, number: int, share: float) -> dict[str, Any]:
        now[0] += 10.0 if number else 25.0  # the first one compiles
        return original(self, number, share)

    monkeypatch.setattr(trainer.Trainer, "step", step)
    monkeypatch.setattr(schedules, "time", SimpleNamespace(monotonic=lambda: now[0]))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "change a code" in r.getMessage()]


@pytest.mark.usefixtures("ten_seconds_a_step")
def test_a_run_by_the_clock_is_warned_of_when_its_pace_is_known(
    setting: Setting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, change = setting.student(), {"steps": None, "minutes": 2.0, "evaluate_every": 0}
    result = setting.train(student, tmp_path, lr=1e-4, **change)
    assert len(result.history) == 10
    (warning,) = warnings_of(caplog)
    assert warning.startswith(
        "about 10 steps fit into 2 minutes, and with so many this run cannot change a code: AdamW"
    )
    assert (tmp_path / "log.jsonl").read_text("utf-8").count("\n") == 10
    caplog.clear()
    setting.train(student, lr=1e-4, **(change | {"minutes": 0.5}))  # over before the pace is known
    (warning,) = warnings_of(caplog)
    assert warning.startswith("about 2 steps fit into 0.5 minutes")
    caplog.clear()
    setting.train(student, lr=0.2, **change)
    assert not warnings_of(caplog)


@pytest.mark.usefixtures("ten_seconds_a_step")
def test_a_run_that_steps_and_the_clock_end_is_warned_of_once(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    student, change = setting.student(), {"evaluate_every": 0, "minutes": 2.0, "lr": 5e-3}
    setting.train(student, steps=6, **change)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("this run cannot change a code")
    caplog.clear()
    setting.train(student, steps=10_000, **change)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("about 10 steps fit into 2 minutes")
    caplog.clear()
    setting.train(student, mode="greedy", steps=None, **(change | {"minutes": 4.0}))
    (warning,) = warnings_of(caplog)
    assert warning.startswith("about 10 steps fit into 2 minutes")


@pytest.mark.usefixtures("ten_seconds_a_step")
def test_a_warning_changes_nothing_in_what_is_trained(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student, change = setting.student(), {"steps": None, "minutes": 2.0, "lr": 3e-3}
    warned = setting.train(student, **change)
    assert len(warnings_of(caplog)) == 1
    monkeypatch.setattr(stages, "TIMED_STEPS", 0)
    quiet = setting.train(student, **change)
    assert len(warnings_of(caplog)) == 1
    assert losses(warned) == losses(quiet)
    assert same(warned.model, quiet.model)


def test_how_many_steps_fit() -> None:
    assert schedules.reckoned_steps([30.0, 32.0, 34.0, 36.0], 60.0) == 16
    assert schedules.reckoned_steps([30.0], 60.0) == 1
    assert schedules.reckoned_steps([70.0, 80.0], 60.0) == 2
    assert schedules.reckoned_steps([1.0, 1.0], 60.0) == 2


def test_steps_without_a_finite_gradient_are_left_out(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, original = setting.student(), objective.forward_kl
    bad = {2}

    def spoiled(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(0)
        loss = original(*args, **options)
        return loss * math.nan if len(calls) - 1 in bad else loss

    monkeypatch.setattr(objective, "forward_kl", spoiled)
    calls: list[int] = []
    result = setting.train(student, held_out=0)
    assert [record.get("skipped") for record in result.history] == [None, None, 1, None, None, None]
    assert math.isfinite(losses(result)[-1])
    bad, calls = set(range(100)), []
    result = setting.train(setting.student(), steps=5, held_out=0, reencode_every=0)
    assert [record["skipped"] for record in result.history] == [1, 2, 3, 4, 5]
    assert set(result.changed_codes.values()) == {0.0}, "a step that is left out changes nothing"
    with pytest.raises(
        ValueError, match=r"no finite gradient for 10 steps.*lower lr or raise t_min"
    ):
        setting.train(setting.student(), steps=20, held_out=0)
    assert len(calls) == 15


def test_layers_that_are_not_trained_come_back_as_they_were(setting: Setting) -> None:
    student = setting.student()
    result = setting.train(student, layers=("1.mlp.up_proj",), lr=0.3, steps=8)
    for name, layer in quantized_layers(student).items():
        other = result.model.get_submodule(name)
        assert isinstance(other, QuantizedLinear)
        assert torch.equal(layer.codes, other.codes) == (not name.endswith("1.mlp.up_proj"))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_state_of_an_optimizer_goes_on_where_it_was(name: Any) -> None:
    if name == "adamw8bit":
        pytest.importorskip("torchao", reason="needs torchao")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 128, generator=generator)

    def made() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(start.clone())
        return parameter, make_optimizer(name, [{"params": [parameter], "lr": 0.1}], fused=False)

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, number: int) -> None:
        parameter.grad = torch.full_like(parameter, 1.0 + number)
        optimizer.step()
        optimizer.zero_grad()

    one, two = made(), made()
    for number in range(3):
        step(*one, number)
    saved = {k: t.clone() for k, t in optimizer_tensors(one[1], {"p": one[0]}).items()}
    load_optimizer_tensors(two[1], {"p": two[0]}, saved)
    two[0].data.copy_(one[0].data)
    for number in range(3, 5):
        step(*one, number)
        step(*two, number)
    assert torch.equal(one[0], two[0])


def test_packages_that_are_asked_for(setting: Setting, tmp_path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("torchao") is None:
        with pytest.raises(ImportError, match=r"softtrellis\[optim\]"):
            setting.train(setting.student(), optimizer="adamw8bit")
    if find_spec("tensorboard") is None:
        with pytest.raises(ImportError, match=r"softtrellis\[tensorboard\]"):
            setting.train(setting.student(), tmp_path, tensorboard=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "train must name one"),
        ({"train": ("weights",)}, "train must be some of"),
        ({"steps": None}, "give steps or minutes"),
        ({"minutes": 0.0}, "minutes must be a positive"),
        ({"start": 1.5}, "start must lie"),
        ({"finish": "hard"}, "unknown estimator"),
        ({"finish_share": -0.1}, "finish_share must lie"),
        ({"optimizer": "sgd"}, "unknown optimizer"),
        ({"clip": -1.0}, "clip must be a positive"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"held_out": -1}, "held_out must be 0"),
        ({"device": "tpu"}, "device"),
        ({"data": ("teacher", "pydoc")}, "cannot be mixed"),
    ],
)
def test_configs_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**change)


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["soft", "straight_through", "identity"])
def test_a_gpu_does_what_the_cpu_does(setting: Setting, estimator: str) -> None:
    student = setting.student("hyb", 10)
    change = {"estimator": estimator, "train": ("latents", "scales", "norms"), "measure_every": 3}
    found = {device: setting.train(student, device=device, **change) for device in ("cpu", "cuda")}
    assert losses(found["cuda"]) == pytest.approx(losses(found["cpu"]), rel=0.05)
    assert {p.device.type for p in found["cuda"].model.parameters()} == {"cpu"}
    kept = [result.kept[0] for result in found.values()]
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[1][1] == pytest.approx(kept[0][1], rel=0.1)
