"""Ending a long run between two steps when asked to, and keeping others out of its way."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM."""


class DirectoryInUse(RuntimeError):
    """Another process is writing the same output."""


def raise_for(number: int) -> None:
    """What a signal means: KeyboardInterrupt or Terminated."""
    if number == signal.SIGTERM:
        raise Terminated
    raise KeyboardInterrupt


class StopRequest:
    """Notes Control-C and SIGTERM, so that a loop can save before it stops.

    Inside the ``with`` statement the first signal is only noted, and ``check`` raises it; a second
    one stops at once. Outside the main thread, signals do what they always do.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            raise_for(number)
        self.number = number

    def check(self) -> None:
        """KeyboardInterrupt or Terminated, if that was asked for."""
        if self.number is not None:
            raise_for(self.number)


@contextmanager
def termination() -> Iterator[None]:
    """SIGTERM ends what runs inside like Control-C does, with ``Terminated``."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: raise_for(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds ``path`` as a lock file; it is gone afterwards, and free if the process dies.

    Raises:
        DirectoryInUse: another process holds it.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            name = path.name.removesuffix(".lock")
            raise DirectoryInUse(f"another process is writing {path.with_name(name)}") from error
        try:
            same = os.stat(path).st_ino == os.fstat(file).st_ino
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(file)  # its holder removed it between opening and locking
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
