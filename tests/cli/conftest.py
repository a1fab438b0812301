"""A tiny model on disk, checkpoints made from it, and a way to run commands."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli.support import QUANTIZE, TRAIN, Command, Interrupt, Refused, Result, Start

from softtrellis.cli.main import main
from softtrellis.recipes.trainer import Trainer


@pytest.fixture(scope="module", autouse=True)
def fast(one_thread: None) -> None:
    """All tests of commands have models that small."""


@pytest.fixture
def softtrellis(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process."""

    def run(*arguments: str | Path) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Result(code, printed.out, printed.err)

    return run


@pytest.fixture
def refused(softtrellis: Command) -> Refused:
    """Runs a command that must be refused at once: one line on standard error, nothing else."""

    def run(*arguments: str | Path, code: int) -> str:
        result = softtrellis(*arguments)
        message = result.error
        assert result.code == code
        assert result.out == ""
        assert len(result.err.splitlines()) == 1, result.err
        return message

    return run


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what several tests need is kept; copy it before changing it."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture
def model(shelf: Path, request: pytest.FixtureRequest) -> Path:
    """The full-precision model."""
    if not (shelf / "model").exists():
        shutil.move(request.getfixturevalue("tiny_directory"), shelf / "model")
    return shelf / "model"


@pytest.fixture
def text(shelf: Path) -> Path:
    """A text of 4000 letters, each one token."""
    path = shelf / "text.txt"
    if not path.exists():
        letters = random.Random(0).choices("abcdefgh ", k=4000)
        path.write_text("".join(letters), encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(shelf: Path, model: Path, text: Path, softtrellis: Command) -> Path:
    """Two layers of `model`, quantized."""
    path = shelf / "checkpoint"
    if not path.exists():
        result = softtrellis("quantize", model, "-o", path, "--data", text, *QUANTIZE)
        assert result.code == 0, result.err
    return path


@pytest.fixture
def trained(shelf: Path, checkpoint: Path, model: Path, text: Path, softtrellis: Command) -> Path:
    """`checkpoint` after an uninterrupted training."""
    path = shelf / "trained"
    if not path.exists():
        result = softtrellis(
            "train", checkpoint, "--teacher", model, "-o", path, "--data", text, *TRAIN
        )
        assert result.code == 0, result.err
        (shelf / "train.json").write_text(json.dumps([result.out, result.err]), encoding="utf-8")
    return path


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of `checkpoint` to damage."""
    return shutil.copytree(checkpoint, tmp_path / "damaged")


@pytest.fixture
def quantize(model: Path, text: Path) -> Start:
    return lambda output: ["quantize", model, "-o", output, "--data", text, *QUANTIZE]


@pytest.fixture
def train(checkpoint: Path, model: Path, text: Path) -> Start:
    command = ["train", checkpoint, "--teacher", model, "--data", text, *TRAIN]
    return lambda output: [*command, "-o", output]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """Makes training raise an error before the given step; None lets it pass again."""
    whole = Trainer.step

    def arrange(before: int | None, error: BaseException | None = None) -> None:
        def step(self: Trainer, number: int, share: float) -> dict[str, Any]:
            if number == before:
                raise error or KeyboardInterrupt
            return whole(self, number, share)

        monkeypatch.setattr(Trainer, "step", step)

    return arrange
