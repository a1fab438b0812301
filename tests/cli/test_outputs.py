"""Output directories: whole or not there, and never lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from cli.support import QUANTIZE, Command, Interrupt, Refused, Start, contents

from softtrellis.io.checkpoint import WEIGHTS


@pytest.fixture(params=["quantize", "train"])
def start(request: pytest.FixtureRequest) -> Start:
    return request.getfixturevalue(request.param)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A directory with something in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "precious").write_text("do not lose", encoding="utf-8")
    return folder


def fail_with(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    return fail


# Outputs that exist


def test_an_output_that_exists_is_refused(refused: Refused, start: Start, output: Path) -> None:
    before = contents(output.parent)
    message = refused(*start(output), code=2)
    assert message == f"{output} exists; choose another directory or pass --force"
    assert contents(output.parent) == before


def test_quickstart_refuses_an_output_that_exists(refused: Refused, output: Path) -> None:
    assert "pass --force" in refused("quickstart", "-o", output, code=2)
    assert list(contents(output)) == ["precious"]


def test_force_replaces_and_spares_the_neighbours(
    softtrellis: Command, quantize: Start, output: Path, checkpoint: Path
) -> None:
    neighbour = output.with_name("out.old")
    shutil.copytree(output, neighbour)
    assert softtrellis(*quantize(output), "--force").code == 0
    assert contents(output) == contents(checkpoint)
    assert contents(neighbour) == {"precious": b"do not lose"}
    assert {path.name for path in output.parent.iterdir()} == {"out", "out.old"}


def test_force_replaces_what_a_link_points_to(
    softtrellis: Command, quantize: Start, output: Path, checkpoint: Path
) -> None:
    link = output.with_name("link")
    link.symlink_to(output)
    assert softtrellis(*quantize(link), "--force").code == 0
    assert link.is_symlink()
    assert contents(output) == contents(checkpoint)
    assert {path.name for path in output.parent.iterdir()} == {"out", "link"}


def test_outputs_that_no_force_helps_against(
    refused: Refused,
    start: Start,
    output: Path,
    model: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(output)
    before = contents(output), contents(model)
    for place, message in (
        (text, f"{text} is a file; choose another output directory"),
        (text / "below", f"{text} is a file; choose another output directory"),
        (Path("."), ". contains the current directory; choose another output"),
        (output.parent, f"{output.parent} contains the current directory"),
        (Path("/proc"), "/proc is a mount point; choose a directory inside it"),
        (model, f"{model} is also the input; choose another output directory"),
    ):
        assert refused(*start(place), "--force", code=2).startswith(message)
    assert (contents(output), contents(model)) == before


# Crashes


@pytest.mark.parametrize("existing", [False, True])
def test_a_crash_while_saving(
    softtrellis: Command,
    quantize: Start,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: bool,
) -> None:
    if not existing:
        shutil.rmtree(output)
    before = contents(output.parent)
    monkeypatch.setattr("softtrellis.io.checkpoint.model_card", fail_with(RuntimeError("broken")))
    result = softtrellis(*quantize(output), "--force")
    assert result.error.startswith("RuntimeError: broken (--debug shows where); ")
    assert result.error.endswith("keeps the run; the same command with --resume goes on")
    assert (result.code, result.out) == (1, "")
    shutil.rmtree(output.parent / "out.partial")
    assert contents(output.parent) == before


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_quantize(
    softtrellis: Command,
    quantize: Start,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: bool,
) -> None:
    if not existing:
        shutil.rmtree(output)
    before = contents(output.parent)
    monkeypatch.setattr(
        "softtrellis.recipes.block_ptq.quantize_group", fail_with(KeyboardInterrupt())
    )
    result = softtrellis(*quantize(output), "--force")
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[-1] == "softtrellis: interrupted"
    assert contents(output.parent) == before
    assert [path.name for path in output.parent.iterdir()] == (["out"] if existing else [])


def test_a_rename_that_fails(
    softtrellis: Command, quantize: Start, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "out.partial":
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    result = softtrellis(*quantize(output), "--force")
    assert result.error == f"{output}.partial: Input/output error"
    assert contents(output) == {"precious": b"do not lose"}


# Full disks


def disk_full() -> list[Exception]:
    from safetensors import SafetensorError

    return [
        OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ]


@pytest.mark.parametrize("error", disk_full(), ids=lambda error: type(error).__name__)
def test_a_disk_that_is_full_at_the_end(
    softtrellis: Command,
    quantize: Start,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    monkeypatch.setattr("safetensors.torch.save_file", fail_with(error))
    result = softtrellis(*quantize(output), "--force")
    assert (result.code, result.out) == (1, "")
    assert result.error.startswith("the disk is full (")
    assert result.error.endswith("); free some space and repeat the command")
    assert contents(output.parent) == {"out/precious": b"do not lose"}


def test_a_disk_that_fills_up_in_training(
    softtrellis: Command,
    train: Start,
    trained: Path,
    tmp_path: Path,
    interrupt: Interrupt,
) -> None:
    interrupt(3, disk_full()[0])
    result = softtrellis(*train(tmp_path / "out"))
    assert result.code == 1
    assert result.error.startswith("the disk is full (model.safetensors: No space left")
    assert f"{tmp_path / 'out.partial'} keeps the run; the same command with" in result.error
    interrupt(None)
    assert softtrellis(*train(tmp_path / "out"), "--resume").code == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()


def test_a_file_system_that_is_full(model: Path, text: Path, tmp_path: Path) -> None:
    """Really fills a small file system, in a mount namespace of its own."""
    script = (
        "mount -t tmpfs -o size=200k none disk || exit 9\n"
        "mkdir disk/out && echo old >disk/out/old\n"
        '"$@"; code=$?\n'
        "ls -A disk disk/out; exit $code"
    )
    (tmp_path / "disk").mkdir()
    arguments = ["-o", "disk/out", "--force", "--data", text, "--no-hessian", *QUANTIZE]
    command = [sys.executable, "-m", "softtrellis", "quantize", model, *arguments]
    wrapped = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    done = subprocess.run(
        [*wrapped, *map(str, command)], cwd=tmp_path, capture_output=True, text=True
    )
    if done.returncode == 9 or "unshare: " in done.stderr:
        pytest.skip("needs leave to mount a tmpfs in a namespace of its own")
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("softtrellis: error: the disk is full (")
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == ["disk:", "out", "disk/out:", "old"]
