"""Writing directories whole or not at all, and checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softtrellis.io.errors import is_disk_full
from softtrellis.io.interrupts import exclusive

STATE = "train_state.safetensors"
"""What an interrupted training run can go on from."""

STATES = "*_state*"
"""Files that an interrupted run can go on from; a partial directory with one is never lost.

Directories of such a name belong to one of these files."""

_KEPT = (STATES, "log*")
_UNFINISHED = ".tmp"


class OutputExists(FileExistsError):
    """The output is already there, or cannot be replaced."""


def check_output(directory: Path, *, force: bool) -> None:
    """Refuses an output directory that exists, unless forced.

    Raises:
        OutputExists: it exists; or it is a file, inside a file, a mount point, or contains the
            current directory, which no force helps against.
    """
    above = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not above.is_dir():
        raise OutputExists(f"{above} is a file; choose another output directory")
    if not directory.exists():
        return
    if Path.cwd().is_relative_to(directory.resolve()):
        raise OutputExists(f"{directory} contains the current directory; choose another output")
    if directory.is_mount():
        raise OutputExists(f"{directory} is a mount point; choose a directory inside it")
    if not force:
        raise OutputExists(f"{directory} exists; choose another directory or pass --force")


def partial_path(directory: Path) -> Path:
    """Where an output directory is written until it is whole."""
    return directory.with_name(directory.name + ".partial")


@contextmanager
def whole_directory(
    directory: Path, *, force: bool = False, resume: bool = False
) -> Iterator[Path]:
    """A directory to write into that takes the output's name only when all went well.

    The old output stays until then. An interrupted run leaves ``<name>.partial`` if it has saved
    a state there to go on from, and otherwise nothing.

    Args:
        directory: the output.
        force: replace an output that exists.
        resume: go on in the partial directory.

    Raises:
        OutputExists: the output exists and ``force`` is off, or an interrupted run could go on
            and neither ``resume`` nor ``force`` is on.
        FileNotFoundError: ``resume`` without an interrupted run.
        DirectoryInUse: another process is writing it.
    """
    check_output(directory, force=force)
    if directory.is_symlink():
        directory = directory.resolve()
    partial = partial_path(directory)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(partial.with_name(partial.name + ".lock")):
        with _partial(partial, force=force, resume=resume):
            yield partial
        _exchange(partial, directory)
        for path in directory.glob(STATES):
            remove(path)


@contextmanager
def _partial(partial: Path, *, force: bool, resume: bool) -> Iterator[None]:
    """A partial directory, new or gone on with, which stays after an error if it has a state."""
    resumable = _has_state(partial)
    if resume and not resumable:
        raise FileNotFoundError(f"there is no interrupted run in {partial}; start without --resume")
    if resumable and not resume and not force:
        raise OutputExists(
            f"an interrupted run lies in {partial}; go on with --resume, or discard it with --force"
        )
    if partial.exists() and not resume:
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    for path in partial.iterdir():  # what was being written when the run was killed
        if path.suffix == _UNFINISHED or not (path.is_dir() or any(map(path.match, _KEPT))):
            path.unlink()
    try:
        yield
    except BaseException as error:
        if is_disk_full(error):
            error.add_note(f"{partial.parent} has {_free(partial):,} bytes left")
        if not _has_state(partial):
            shutil.rmtree(partial, ignore_errors=True)
        elif not isinstance(error, ValueError):
            error.add_note(f"{partial} keeps the run; the same command with --resume goes on")
        raise


def remove(path: Path) -> None:
    """Removes a file or a directory; of a link to one the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _free(partial: Path) -> int:
    return shutil.disk_usage(partial.parent).free


def _has_state(partial: Path) -> bool:
    states = partial.glob(STATES)
    return any(path.suffix != _UNFINISHED and not path.is_dir() for path in states)


def _exchange(partial: Path, directory: Path) -> None:
    """Renames ``partial`` to ``directory`` and deletes what was there."""
    if not directory.exists():
        os.rename(partial, directory)
        return
    with tempfile.TemporaryDirectory(
        dir=directory.parent, prefix=f".{directory.name}-", ignore_cleanup_errors=True
    ) as aside:
        old = Path(aside) / directory.name
        os.rename(directory, old)
        try:
            os.rename(partial, directory)
        except BaseException:
            os.rename(old, directory)
            raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to that takes the file's name only when all went well."""
    beside = path.with_name(path.name + _UNFINISHED)
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
