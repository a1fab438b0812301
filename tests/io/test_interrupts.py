"""Stopping between steps, and one writer for one output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from softtrellis.io.files import whole_directory
from softtrellis.io.interrupts import (
    DirectoryInUse,
    StopRequest,
    Terminated,
    exclusive,
    termination,
)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_is_raised_where_it_suits(number: int, error: type[BaseException]) -> None:
    before = signal.getsignal(number)
    steps = 0
    with pytest.raises(error) as caught, StopRequest() as stop:  # noqa: PT012
        for _ in range(3):
            os.kill(os.getpid(), number)
            steps += 1
            stop.check()
    assert steps == 1
    assert type(caught.value) is error
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), StopRequest():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert not reached


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with StopRequest() as stop, termination():
            seen.append(signal.getsignal(signal.SIGINT))
            stop.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_termination_is_an_interruption() -> None:
    with pytest.raises(Terminated), termination():
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_second_writer_is_refused(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from softtrellis.io.files import whole_directory\n"
        "with whole_directory(Path(sys.argv[1]), force=True):\n"
        "    print('writing', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(output)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "writing\n"
        for options in ({}, {"force": True}, {"resume": True}):
            with (
                pytest.raises(DirectoryInUse, match="another process is writing"),
                whole_directory(output, **options),
            ):
                pytest.fail("two writers")
        assert (tmp_path / "out.partial").is_dir()
    finally:
        process.communicate("")
    assert output.is_dir()
    with whole_directory(output, force=True) as partial:
        (partial / "file").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_directories_of_a_state_are_none(tmp_path: Path) -> None:
    """Ranks that were killed in their first save leave one; a finished run's are removed."""
    parts = tmp_path / "out.partial" / "train_state-0123abcd"
    parts.mkdir(parents=True)
    with (
        pytest.raises(FileNotFoundError, match="no interrupted run"),
        whole_directory(tmp_path / "out", resume=True),
    ):
        pytest.fail("nothing to resume")
    with whole_directory(tmp_path / "out") as partial:
        assert not parts.exists()
        parts.mkdir()
        (partial / "train_state.safetensors").write_text("names it")
        (partial / "file").write_text("mine")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_a_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    lock = tmp_path / "out.lock"
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from softtrellis.io.interrupts import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(lock)], check=False)
    assert lock.exists()
    with exclusive(lock):
        pass
    assert not lock.exists()
