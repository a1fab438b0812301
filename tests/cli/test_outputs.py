"""Output directories: whole or not there, and never lost."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from cli.support import QUANTIZE, Command, Interrupt, Refused, Start, contents

from softtrellis.cli.main import LESS_MEMORY, build_parser
from softtrellis.io.checkpoint import WEIGHTS
from softtrellis.io.files import STATE


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


def test_outputs_inside_an_input_and_around_one(
    refused: Refused, checkpoint: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "shelf" / "qx")
    (tmp_path / "link").symlink_to(tmp_path / "shelf" / "qx")
    before = contents(tmp_path)
    for qx in (tmp_path / "shelf" / "qx", tmp_path / "link"):
        inside = qx / "new" / "inside"
        for command in (
            ["export", qx, "--format", "dense"],
            ["export", qx, "--format", "exl3"],
            ["import", qx],
            ["quantize", qx, "--data", text, *QUANTIZE],
            ["train", qx, "--teacher", model, "--data", text],
            ["train", checkpoint, "--teacher", qx, "--data", text],
        ):
            message = refused(*command, "-o", inside, code=2)
            assert message == f"{inside} is inside the input; choose another output directory"
        message = refused("export", qx, "--format", "dense", "-o", tmp_path, "--force", code=2)
        assert message == f"the input {qx} is inside {tmp_path}; choose another output directory"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("folder", ["out", "out.partial"])
@pytest.mark.parametrize("form", ["{}", "documents:{}"])
def test_text_inside_the_output(
    refused: Refused,
    checkpoint: Path,
    model: Path,
    text: Path,
    tmp_path: Path,
    folder: str,
    form: str,
) -> None:
    inside = tmp_path / folder / "corpus" / "text.txt"
    inside.parent.mkdir(parents=True)
    shutil.copy(text, inside)
    before = contents(tmp_path)
    data = ["--data", "pydoc", form.format(inside)]
    for command in (
        ["quantize", model, *data, *QUANTIZE],
        ["quantize", model, "--progressive", "1", "--progressive-data", *data[1:], *QUANTIZE],
        ["train", checkpoint, "--teacher", model, *data],
        ["quickstart", "--model", model, *data],
    ):
        message = refused(*command, "-o", tmp_path / "out", "--force", code=2)
        place = tmp_path / folder
        assert message == f"the input {inside} is inside {place}; choose another output directory"
    assert contents(tmp_path) == before


def test_sources_of_text_that_are_no_files(
    softtrellis: Command, quantize: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is called like one does not count."""
    (tmp_path / "out").mkdir()
    (tmp_path / "pydoc").symlink_to(tmp_path / "out" / "pydoc")
    (tmp_path / "out" / "pydoc").touch()
    monkeypatch.chdir(tmp_path)
    assert softtrellis(*quantize(Path("out")), "--data", "pydoc", "--force").code == 0


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
    assert "); free some space and repeat the command; " in result.error
    assert re.search(rf"{output.parent} has [\d,]+ bytes left$", result.error)
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
    assert f"{tmp_path} has " in result.error
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
    done = in_a_namespace(script, ["quantize", model, *arguments], tmp_path)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("softtrellis: error: the disk is full (")
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == ["disk:", "out", "disk/out:", "old"]


def test_a_file_system_that_fills_up_in_training(
    train: Start, trained: Path, tmp_path: Path
) -> None:
    """The saved state survives, nothing is torn, and with more room the run goes on."""
    script = (
        "mount -t tmpfs -o size=260k none disk || exit 9\n"
        '"$@" && exit 8\n'
        "ls -A disk disk/out.partial\n"
        "mount -o remount,size=4m disk\n"
        '"$@" --resume || exit 7\n'
        "ls -A disk && cp -r disk/out ."
    )
    (tmp_path / "disk").mkdir()
    done = in_a_namespace(script, train(Path("disk/out")), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "softtrellis: error: the disk is full (" in done.stderr
    assert "disk has " in done.stderr
    assert "disk/out.partial keeps the run; the same command with --resume goes on" in done.stderr
    assert "Traceback" not in done.stderr
    listed = done.stdout.split()
    assert listed[:6] == ["disk:", "out.partial", "disk/out.partial:", "log.jsonl", STATE, "4"]
    assert listed[-1] == "out"
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()


def test_a_limit_on_the_size_of_files(
    softtrellis: Command, train: Start, trained: Path, tmp_path: Path
) -> None:
    """As with a disk quota: files may not grow beyond what a state takes."""
    output = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((trained / WEIGHTS).stat().st_size - 1000, hard))
    try:
        result = softtrellis(*train(output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.code == 1
    assert result.error.startswith("the disk is full (")
    assert f"{output}.partial keeps the run" in result.error
    assert not [name for name in contents(tmp_path) if "tmp" in name]
    assert softtrellis(*train(output), "--resume").code == 0
    assert (output / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    assert set(contents(tmp_path)) == {f"out/{name}" for name in contents(trained)}


def in_a_namespace(
    script: str, command: list[str | Path], place: Path
) -> subprocess.CompletedProcess[str]:
    """A shell script with the command as its arguments, where it may mount a file system."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    wrapped = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    wrapped += [sys.executable, "-m", "softtrellis", *map(str, command)]
    done = subprocess.run(wrapped, cwd=place, capture_output=True, text=True)
    if done.returncode == 9 or "unshare: " in done.stderr:
        pytest.skip("needs leave to mount a tmpfs in a namespace of its own")
    return done


# Memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_in_training(
    softtrellis: Command, train: Start, tmp_path: Path, interrupt: Interrupt, error: Exception
) -> None:
    interrupt(3, error)
    result = softtrellis(*train(tmp_path / "out"))
    assert result.code == 1
    assert result.error.startswith("out of memory (")
    assert "lower --micro-batch or --ctx, add --checkpoint-layers" in result.error
    assert "out.partial keeps the run" in result.error
    interrupt(None)
    options = ["--resume", "--micro-batch", "1"]
    assert softtrellis(*train(tmp_path / "out"), *options).code == 0, "it may be lowered"


def test_what_to_lower_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command, advice in LESS_MEMORY.items():
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, "--help"])
        options = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", advice):
            assert f"{option} " in options, f"{command} has no {option}"
