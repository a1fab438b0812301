"""How a run ends, what it warns of, and which code it keeps."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recipes.support import EVERYTHING, Setting, losses, same

from softtrellis.evaluation.perplexity import score_windows
from softtrellis.recipes import drift, schedules, stages, trainer
from softtrellis.recipes.drift import rate_of_walk


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
    change = {"lr": 30.0, "steps": 3, "evaluate_every": 1, "start": start, "train": ["latents"]}
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
    assert warning.startswith("about 3 steps fit into 0.5 minutes")
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
def test_the_learning_rate_of_a_run_by_the_clock(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "MOST_LR", 1.0)  # which rates of so few steps would exceed
    student = setting.student()
    change = {"steps": None, "minutes": 10.0, "lr": "auto", "evaluate_every": 0, "save_every": 5}
    whole = setting.train(student, **change)
    peak = rate_of_walk(58)  # the first step takes 25 seconds, the others 10
    assert rate_of_walk(1000) < peak < rate_of_walk(20)
    for step, record in enumerate(whole.history):
        lr = peak if step > stages.TIMED_STEPS else rate_of_walk(1000)
        assert record["lr"] == schedules.learning_rate_at(record["share"], step, lr=lr, warmup=5)
    original = trainer.Trainer.step

    def step(self: Any, number: int, share: float) -> dict[str, Any]:
        if number == 8:
            raise KeyboardInterrupt
        return original(self, number, share)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            setting.train(student, tmp_path, **change)
    resumed = setting.train(student, tmp_path, resume=True, **change)
    for number in (5, 20):
        record = resumed.history[number]
        expected = schedules.learning_rate_at(record["share"], number, lr=peak, warmup=5)
        assert record["lr"] == expected


@pytest.mark.usefixtures("ten_seconds_a_step")
def test_a_warning_changes_nothing_in_what_is_trained(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    student, change = setting.student(), {"steps": None, "minutes": 2.0, "lr": 3e-3}
    warned = setting.train(student, **change)
    assert len(warnings_of(caplog)) == 1
    monkeypatch.setattr(stages.Run, "_warn", lambda *_: False)
    quiet = setting.train(student, **change)
    assert len(warnings_of(caplog)) == 1
    assert losses(warned) == losses(quiet)
    assert same(warned.model, quiet.model)


def test_how_many_steps_fit() -> None:
    assert schedules.reckoned_steps([30.0, 32.0, 34.0, 36.0], 60.0) == 16
    assert schedules.reckoned_steps([30.0], 60.0) == 1
    assert schedules.reckoned_steps([70.0, 80.0], 60.0) == 2
    slow = [30.0, 40.0, 50.0, 52.0, 54.0]
    assert schedules.reckoned_steps(slow, 60.0, uneven=3) == 8
    assert schedules.reckoned_steps(slow[:2], 60.0, uneven=3) == 4
    assert schedules.reckoned_steps([1.0, 1.0], 60.0) == 2


def test_all_rates_end_where_they_are_told_to(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    original = trainer.set_learning_rates

    def noted(optimizer: Any, rates: list[float]) -> None:
        seen.append(list(rates))
        original(optimizer, rates)

    monkeypatch.setattr(trainer, "set_learning_rates", noted)
    for end in (0.0, 0.5):
        seen.clear()
        change = {"steps": 4, "warmup": 0, "lr_end": end, "train": ("latents", "scales", "norms")}
        result = setting.train(setting.student(), **change)
        assert result.history[-1]["lr"] == pytest.approx(end * result.history[0]["lr"])
        assert seen[-1] == pytest.approx([end * rate for rate in seen[0]])
