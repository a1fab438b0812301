"""The same seed on the same device gives the same bytes, on several threads too.

The backend "torch" is compared in ``test_faults``, on one thread.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.support import Command, Start, contents

from softtrellis.io.checkpoint import WEIGHTS

FEATURES = ["--fine-tune", "--epochs", "1", "--end-to-end", "1"]


def comparable(run: Path) -> dict[str, object]:
    """All files, without what the clock says in the log."""
    files: dict[str, object] = dict(contents(run))
    if "log.jsonl" in files:
        lines = (run / "log.jsonl").read_text("utf-8").splitlines()
        files["log.jsonl"] = [json.loads(line) | {"seconds": 0.0} for line in lines]
    return files


@pytest.mark.parametrize("command", ["quantize", "quantize and tune", "train"])
def test_two_runs_are_the_same(
    softtrellis: Command,
    quantize: Start,
    train: Start,
    tmp_path: Path,
    command: str,
) -> None:
    torch.set_num_threads(2)  # the fixture `one_thread` sets it back
    start = train if command == "train" else quantize
    options = FEATURES if "tune" in command else []
    runs = [tmp_path / "one", tmp_path / "two", tmp_path / "other"]
    for run, seed in zip(runs, ["3", "3", "4"], strict=True):
        result = softtrellis(*start(run), *options, "--seed", seed)
        assert result.code == 0, result.err
    assert comparable(runs[0]) == comparable(runs[1])
    assert (runs[0] / WEIGHTS).read_bytes() != (runs[2] / WEIGHTS).read_bytes()
