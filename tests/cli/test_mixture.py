"""Training on text of which the teacher writes a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli.support import SMALL, TRAIN, Command, Interrupt, contents

from softtrellis.io.checkpoint import WEIGHTS
from softtrellis.io.manifest import read_manifest
from softtrellis.recipes.qat import DistillConfig


def test_a_mixture_is_trained_on_and_gone_on_with(
    softtrellis: Command,
    checkpoint: Path,
    model: Path,
    text: Path,
    tmp_path: Path,
    interrupt: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = ["--data", text, "teacher", "--teacher-share", "0.25", "--shift-windows"]
    command = ["train", checkpoint, "--teacher", model, *data, *TRAIN, "--steps", "6"]
    whole, output = tmp_path / "whole", tmp_path / "out"
    result = softtrellis(*command, "-o", whole)
    assert result.code == 0, result.err
    assert "sample: 100%" in result.err
    assert "warning" not in result.err
    kept = contents(tmp_path / "cache")
    assert len(kept) == 1

    interrupt(5)  # in the second epoch
    assert softtrellis(*command, "-o", output).code == 130
    interrupt(None)
    for change, had in (("0.5", "teacher_share=0.25"), ("0.25", None)):
        result = softtrellis(*command, "-o", output, "--teacher-share", change, "--resume")
        assert result.code == (had is not None), result.err
        assert had is None or f"the interrupted run had {had}" in result.error
    assert (output / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert contents(tmp_path / "cache").items() >= kept.items()

    settings = read_manifest(output).provenance["train"]
    assert (settings["data"], settings["teacher_share"]) == ([str(text), "teacher"], 0.25)
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    assert DistillConfig(**given).teacher_share == 0.25


def test_a_text_of_few_windows(
    softtrellis: Command,
    checkpoint: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "few.txt"
    path.write_text("abcdefg " * 45, encoding="utf-8")  # 324 to train on, 36 held out
    command = ["train", checkpoint, "--teacher", model, "--data", path, "teacher", *SMALL]
    command += ["--steps", "1", "--batch", "1"]
    said = "the teacher writes 10, a share of 0.5, slowly the first time"
    for windows, few in (([], ""), (["--windows", "64"], ", fewer than 32")):
        result = softtrellis(*command, *windows, "-o", tmp_path / "out", "--force")
        assert result.code == 0, result.err
        assert f"warning: the text has 10 windows{few}: {said}" in result.err.splitlines()
