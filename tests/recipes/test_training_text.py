"""Text to train on that is partly loaded and partly written by the teacher."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment import Experiment, add_arguments

from softtrellis.recipes.qat import DistillConfig
from softtrellis.recipes.teacher_text import is_mixture, sample_windows
from softtrellis.recipes.training_text import TrainingWindows, training_windows

pytestmark = pytest.mark.usefixtures("one_thread")

CTX = 32
Windows = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what the teacher wrote is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "softtrellis" / "teacher_text"


@pytest.fixture
def documents(tmp_path: Path) -> str:
    """40 documents of 26 tokens: 36 to train on, which are 29 windows, and 4 held out."""
    path = tmp_path / "documents.txt"
    path.write_text("".join(f"This is document no. {i:03d}\n\n" for i in range(40)), "utf-8")
    return f"documents:{path}"


@pytest.fixture
def windows_of(tiny_llama: Any, tiny_tokenizer: Any, documents: str) -> Windows:
    def run(*more: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        config = DistillConfig(data=(documents, *more), ctx=CTX, **{"held_out": 2} | options)
        return training_windows(config, tiny_llama, tiny_tokenizer)

    return run


def written(windows: torch.Tensor) -> torch.Tensor:
    """Which windows start with BOS, as the teacher's do and those of the text do not."""
    return windows[:, 0] == 1


@pytest.mark.parametrize(
    ("windows", "share", "by_teacher"),
    [(12, None, 6), (12, 0.25, 3), (12, 0.75, 9), (5, 0.7, 4), (4, 0.01, 1), (4, 0.99, 3)],
)
def test_the_share_of_so_many_windows(
    windows_of: Windows, windows: int, share: float | None, by_teacher: int
) -> None:
    mixed, held_out = windows_of("teacher", windows=windows, teacher_share=share)
    assert (mixed.shape, mixed.dtype) == ((windows, CTX), torch.int64)
    assert written(mixed).tolist() == [False] * (windows - by_teacher) + [True] * by_teacher
    alone, held_out_alone = windows_of(windows=windows)
    assert torch.equal(mixed[:-by_teacher], alone[: windows - by_teacher])
    assert torch.equal(held_out, held_out_alone)


def test_the_teacher_writes_with_the_runs_seed(
    windows_of: Windows, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    mixed, _ = windows_of("teacher", windows=8, seed=3)
    assert torch.equal(mixed[4:], sample_windows(tiny_llama, tiny_tokenizer, 4, CTX, seed=3))


@pytest.mark.parametrize(
    ("windows", "share", "by_teacher", "message"),
    [
        (None, 0.5, 29, "the text has 29 windows: the teacher writes 29, a share of 0.5,"),
        (None, 0.2, 7, "the text has 29 windows: the teacher writes 7, a share of 0.194,"),
        (80, 0.5, 29, "the text has 29 windows, fewer than 40: the teacher writes 29,"),
        (200, 0.8, 116, "the text has 29 windows, fewer than 40: the teacher writes 116,"),
        (None, 0.01, 1, "the text has 29 windows: the teacher writes 1,"),
    ],
)
def test_the_share_of_what_text_there_is(
    windows_of: Windows,
    caplog: pytest.LogCaptureFixture,
    windows: int | None,
    share: float,
    by_teacher: int,
    message: str,
) -> None:
    mixed, held_out = windows_of("teacher", windows=windows, teacher_share=share)
    assert written(mixed).tolist() == [False] * 29 + [True] * by_teacher
    assert [record.message[: len(message)] for record in caplog.records] == [message]
    alone, held_out_alone = windows_of()
    assert torch.equal(mixed[:29], alone)
    assert torch.equal(held_out, held_out_alone)


def test_enough_text_needs_no_words(windows_of: Windows, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(windows_of("teacher", windows=58)[0]) == 58
    assert not caplog.records


@pytest.mark.parametrize(("batch", "messages"), [(8, 0), (9, 1)])
def test_a_step_of_more_windows_than_there_are(
    windows_of: Windows, caplog: pytest.LogCaptureFixture, batch: int, messages: int
) -> None:
    assert len(windows_of(windows=8, batch=batch)[0]) == 8
    text = "a step of 9 windows takes some twice: there are 8"
    assert [record.message for record in caplog.records] == [text] * messages


def test_nothing_held_out(windows_of: Windows) -> None:
    mixed, held_out = windows_of("teacher", windows=60, held_out=0)
    assert written(mixed).sum() == 30
    assert held_out.shape == (0, CTX)


def test_the_order_of_sources_does_not_matter(windows_of: Windows, documents: str) -> None:
    config = {"windows": 6}
    first, _ = windows_of("teacher", "pydoc", **config)
    last, _ = windows_of("pydoc", "teacher", **config)
    assert torch.equal(first, last)


def test_what_was_written_is_kept(
    windows_of: Windows, cache: Path, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = windows_of("teacher", windows=8)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(tiny_llama, "generate", None)
    assert torch.equal(windows_of("teacher", windows=8)[0], before)
    other, _ = windows_of("teacher", windows=10, teacher_share=0.4)  # as many by the teacher
    assert torch.equal(other[6:], before[4:])


def test_shifted_windows_run_over_the_mixture(windows_of: Windows) -> None:
    mixed, _ = windows_of("teacher", windows=6)
    windows = TrainingWindows(mixed, 6, seed=0, shift=True)
    later = windows.tokens(sorted(windows.rows(1))).flatten()
    assert torch.equal(later, mixed.flatten().roll(-19))  # 32 golden sections less 13
    between = windows.tokens([6 + 2])[0]  # the last of the text, and the first of the teacher's
    assert torch.equal(between, torch.cat((mixed[2, 19:], mixed[3, :19])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ("teacher", "pydoc", "teacher")}, "'teacher' must be named once, got teacher p"),
        ({"data": ("teacher", "teacher")}, "'teacher' must be named once"),
        ({"data": ("teacher",), "teacher_share": 0.5}, "teacher_share must be left out where"),
        ({"data": ("pydoc",), "teacher_share": 0.5}, "teacher_share must be left out where"),
        ({"teacher_share": 0.0}, "teacher_share must be above 0 and below 1, got 0"),
        ({"teacher_share": 1.0}, "teacher_share must be above 0 and below 1, got 1"),
        ({"teacher_share": float("nan")}, "teacher_share must be above 0 and below 1, got nan"),
        ({"windows": 1}, "windows must be at least 2 where the teacher writes some, got 1"),
    ],
)
def test_mixtures_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**({"data": ("pydoc", "teacher")} | change))


def test_mixtures() -> None:
    assert is_mixture(["teacher", "pydoc"])
    assert not is_mixture(["teacher"])
    assert not is_mixture(["pydoc", "teacher.txt"])
    config = DistillConfig(data=("pydoc", "teacher"), teacher_share=0.25)
    assert replace(config, steps=2).teacher_share == 0.25


def test_text_that_is_missing_is_found_before_the_teacher_writes(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_llama, "generate", None)
    config = DistillConfig(data=("no-such.txt", "teacher"), ctx=CTX, windows=4)
    with pytest.raises(FileNotFoundError, match=r"No text at 'no-such\.txt'"):
        training_windows(config, tiny_llama, tiny_tokenizer)


@pytest.mark.parametrize(
    ("train", "by_teacher"), [([], 0), (["teacher"], 4), (["teacher", "--teacher-share", ".25"], 2)]
)
def test_the_texts_of_an_experiment(
    windows_of: Windows,
    documents: str,
    tiny_directory: Path,
    train: list[str],
    by_teacher: int,
) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    files = ["--calibration", documents, "--test", documents, "--json", "none", "--device", "cpu"]
    sizes = ["--ctx", str(CTX), "--windows", "8", "--held-out", "2", "--test-ctx", str(CTX)]
    options = [str(tiny_directory), "--train", documents, *train, *files, *sizes]
    found = Experiment(parser.parse_args(options)).text
    share = by_teacher / 8 or None
    expected = windows_of(*train[:1], windows=8, teacher_share=share)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert written(found[0]).sum() == by_teacher
