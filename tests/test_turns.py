"""benchmarks/turns.py: who has a device when."""

from __future__ import annotations

import threading
from pathlib import Path

from turns import turn

PATIENCE = 10  # seconds


class Run(threading.Thread):
    """A turn that lasts until it is told to end."""

    def __init__(self, folder: Path, *, alone: bool = False) -> None:
        super().__init__(daemon=True)
        self.folder, self.alone = folder, alone
        self.begun, self.told = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with turn(self.folder, "cpu", alone=self.alone):
            self.begun.set()
            assert self.told.wait(PATIENCE)

    def end(self) -> None:
        self.told.set()
        self.join(PATIENCE)


def test_runs_share_a_device_and_some_have_it_alone(tmp_path: Path) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    assert first.begun.wait(PATIENCE)
    assert second.begun.wait(PATIENCE)
    alone = Run(tmp_path, alone=True)
    first.end()
    assert not alone.begun.wait(0.5)
    later = Run(tmp_path)
    assert not later.begun.wait(0.5)
    second.end()
    assert alone.begun.wait(PATIENCE)
    assert not later.begun.wait(0.5)
    alone.end()
    assert later.begun.wait(PATIENCE)
    later.end()


def test_without_a_folder_nobody_waits(tmp_path: Path) -> None:
    with turn(None, "cpu", alone=True), turn(None, "cpu", alone=True):
        pass
    assert not list(tmp_path.iterdir())
