"""Interrupted training, and how it goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.support import QUANTIZE, SMALL, TRAIN, Command, Interrupt, Refused, Start, contents
from safetensors.torch import load_file

from softtrellis.io.checkpoint import WEIGHTS
from softtrellis.io.files import STATE


def weights_and_losses(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return (run / WEIGHTS).read_bytes(), [r | {"seconds": 0.0} for r in records]


def codes(run: Path) -> dict[str, torch.Tensor]:
    return {n: t for n, t in load_file(run / WEIGHTS).items() if n.endswith(".codes")}


def test_resume_equals_no_interruption(
    softtrellis: Command,
    refused: Refused,
    train: Start,
    trained: Path,
    checkpoint: Path,
    tmp_path: Path,
    interrupt: Interrupt,
) -> None:
    assert codes(trained).keys() == codes(checkpoint).keys()
    assert not any(torch.equal(t, codes(checkpoint)[n]) for n, t in codes(trained).items())
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    interrupt(3)
    result = softtrellis(*train(output))
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[-1] == (
        f"softtrellis: interrupted; {partial} keeps the run; the same command with --resume goes on"
    )
    assert set(contents(tmp_path)) == {f"out.partial/{STATE}", "out.partial/log.jsonl"}
    kept = contents(partial)

    message = refused(*train(output), code=2)
    assert message.startswith(f"an interrupted run lies in {partial}; go on with")
    assert "--resume" in message
    assert "--force" in message
    for change, name in ((["--lr", "0.2"], "lr=0.15"), (["--seed", "1"], "seed=0")):
        result = softtrellis(*train(output), *change, "--resume")
        assert result.code == 1
        assert f"the interrupted run had {name}" in result.error
        assert "same settings" in result.error
    assert contents(partial) == kept

    with (partial / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 3, "loss"')  # a process that was killed while it wrote
    interrupt(None)
    result = softtrellis(*train(output), "--resume")
    assert result.code == 0, result.err
    assert result.out.startswith("4 steps in ")
    assert weights_and_losses(output) == weights_and_losses(trained)
    assert set(contents(output)) == set(contents(trained))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def partial(
    shelf: Path, train: Start, tmp_path: Path, softtrellis: Command, interrupt: Interrupt
) -> Path:
    """What training to `out` left when it was interrupted."""
    kept = shelf / "kept.partial"
    if not kept.exists():
        interrupt(3)
        assert softtrellis(*train(shelf / "kept")).code == 130
        interrupt(None)
    return shutil.copytree(kept, tmp_path / "out.partial")


def test_resume_with_another_checkpoint_or_text(
    softtrellis: Command, partial: Path, model: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    options = ["-o", other, "--data", text, *QUANTIZE, "--seed", "1"]
    assert softtrellis("quantize", model, *options).code == 0
    reverse = tmp_path / "reverse.txt"
    reverse.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    kept = contents(partial)
    for start, data, name in ((other, text, "checkpoint"), (checkpoint, reverse, "text")):
        command = ["train", start, "--teacher", model, "-o", tmp_path / "out", "--data", data]
        result = softtrellis(*command, *TRAIN, "--resume")
        assert result.code == 1
        assert f"the interrupted run had another {name}; resume with the same" in result.error
    assert contents(partial) == kept


def test_other_commands_spare_an_interrupted_run(
    refused: Refused, softtrellis: Command, quantize: Start, partial: Path, tmp_path: Path
) -> None:
    kept = contents(partial)
    message = refused(*quantize(tmp_path / "out"), code=2)
    assert message.startswith(f"an interrupted run lies in {partial}")
    assert contents(partial) == kept
    assert softtrellis(*quantize(tmp_path / "out"), "--force").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_state(softtrellis: Command, train: Start, partial: Path, tmp_path: Path) -> None:
    data = (partial / STATE).read_bytes()
    (partial / STATE).write_bytes(data[: len(data) // 2])
    result = softtrellis(*train(tmp_path / "out"), "--resume")
    assert result.code == 1
    assert f"{partial / STATE} is damaged" in result.error
    assert "--force" in result.error


def test_nothing_to_resume(refused: Refused, train: Start, tmp_path: Path) -> None:
    message = refused(*train(tmp_path / "out"), "--resume", code=1)
    assert message == (
        f"there is no interrupted run in {tmp_path / 'out.partial'}; start without --resume"
    )
    assert not list(tmp_path.iterdir())


def test_an_interruption_before_the_first_saved_state(
    softtrellis: Command, train: Start, tmp_path: Path, interrupt: Interrupt
) -> None:
    interrupt(1)
    result = softtrellis(*train(tmp_path / "out"))
    assert result.code == 130
    assert result.err.splitlines()[-1] == "softtrellis: interrupted"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_to_the_process(
    checkpoint: Path, model: Path, text: Path, tmp_path: Path, number: int, code: int, word: str
) -> None:
    """Control-C, or SIGTERM, while training, in a process of its own: it saves before it ends."""
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from softtrellis.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    options = ["--steps", "10000", "--data", text, *SMALL]
    command = ["train", checkpoint, "--teacher", model, "-o", tmp_path / "out", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        log = tmp_path / "out.partial" / "log.jsonl"
        while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        assert not (tmp_path / "out.partial" / STATE).exists()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert f"softtrellis: {word}" in err
    assert "--resume goes on" in err.splitlines()[-1]
    assert (tmp_path / "out.partial" / STATE).exists()
