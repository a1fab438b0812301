"""Processes that share a GPU take turns, so that runs of so many minutes have it alone."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def turn(folder: Path | None, device: str, *, alone: bool = False) -> Iterator[None]:
    """Holds a device: with other processes, or alone, which waits until these have ended theirs.

    Nobody else begins a turn while a process waits to be alone.

    Args:
        folder: where the locks are, of all processes that take turns; None is no turn at all.
        device: of torch, "cuda" say.
        alone: or with others who do not ask for that.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    name = str(torch.cuda.get_device_properties(device).uuid) if device != "cpu" else device
    with (folder / f"{name}.door").open("w") as door, (folder / f"{name}.room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
