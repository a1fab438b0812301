"""Writing directories whole or not at all, and checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class OutputExists(FileExistsError):
    """The output is already there."""


def check_output(directory: Path, *, force: bool) -> None:
    """Refuses an output directory that exists, unless forced.

    Raises:
        OutputExists: it exists.
        NotADirectoryError: a file has that name.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; choose another output directory")
    if directory.exists() and not force:
        raise OutputExists(f"{directory} exists; choose another directory or pass --force")


def partial_path(directory: Path) -> Path:
    """Where an output directory is written until it is whole."""
    return directory.with_name(directory.name + ".partial")


@contextmanager
def whole_directory(
    directory: Path, *, force: bool = False, resumable: bool = False, resume: bool = False
) -> Iterator[Path]:
    """A directory to write into that takes the output's name only when all went well.

    The old output stays until then. An interrupted run that is resumable leaves
    ``<name>.partial``, any other nothing.

    Args:
        directory: the output.
        force: replace an output that exists.
        resumable: keep the partial directory when interrupted, and refuse to overwrite it.
        resume: go on in the partial directory.

    Raises:
        OutputExists: the output exists and ``force`` is off, or an interrupted run could go on
            and neither ``resume`` nor ``force`` is on.
        FileNotFoundError: ``resume`` without an interrupted run.
    """
    check_output(directory, force=force)
    partial = partial_path(directory)
    if resume and not partial.exists():
        raise FileNotFoundError(f"there is no interrupted run in {partial}; start without --resume")
    if partial.exists() and not resume:
        if resumable and not force:
            raise OutputExists(
                f"an interrupted run lies in {partial}; go on with --resume, "
                "or start over with --force"
            )
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        if not resumable or not any(partial.iterdir()):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if directory.exists():
        old = directory.with_name(directory.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(directory, old)
        os.rename(partial, directory)
        shutil.rmtree(old)
    else:
        os.rename(partial, directory)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside ``path`` and renames it there."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
