"""CUDA C++ kernels in a build on the host: ``trellis/host/`` stands in for the GPU."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

import pytest
from torch import Tensor

HOST = Path(__file__).parent / "trellis" / "host"
FLAGS = ("-O2", "-ffp-contract=off", "-std=c++17", "-fPIC", "-shared", "-w")


class Library:
    """Kernels of ``cuda/<source>``; a fibre stands in for a thread."""

    def __init__(self, folder: Path, source: str, kernels: Iterable[str]) -> None:
        """Compiles them in an empty folder; skips the test without a compiler."""
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("needs g++ to compile CUDA kernels for the host")
        for file in (files("softtrellis.trellis") / "cuda").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        for path in HOST.iterdir():
            shutil.copy(path, folder)
        names = " ".join(f"THREAD({name})" for name in kernels)
        defined = (f'-DSOURCE="{source}"', f"-DKERNELS={names}")
        command = [compiler, *FLAGS, *defined, "run.cpp", "kernels.cpp", "-o", "host.so"]
        subprocess.run(command, cwd=folder, check=True)
        self._library = ctypes.CDLL(str(folder / "host.so"))
        self._library.launch.restype = ctypes.c_char_p

    def launch(
        self,
        name: str,
        parameter: bytes,
        blocks: int,
        threads: int,
        shared_bytes: int,
        *,
        backwards: bool,
        constants: Sequence[tuple[int, int]] = (),
        written: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Runs one block after the other; fails the test for what a GPU would not forgive.

        Args:
            name: of the kernel.
            parameter: its structure.
            blocks, threads, shared_bytes: of the grid; of a block.
            backwards: whether the last thread of a block runs first.
            constants: addresses and bytes of global memory that may be read by functions of the
                headers which stand in for instructions.
            written: likewise, but by the kernel before this one.
        """
        ranges = [(at, size, 0) for at, size in constants] + [(at, size, 1) for at, size in written]
        readable = b"".join(struct.pack("3Q", at, at + size, late) for at, size, late in ranges)
        thread = getattr(self._library, f"thread_{name}")
        sizes = (blocks, threads, shared_bytes, int(backwards))
        fault = self._library.launch(thread, parameter, *sizes, readable, len(ranges))
        assert not fault, f"{name}: {fault.decode()}"


def relative(found: Tensor, exact: Tensor) -> float:
    """Error of finite numbers."""
    assert bool(found.isfinite().all())
    return float((found.double() - exact.double()).norm() / exact.double().norm())
