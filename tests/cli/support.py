"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LAYERS = ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"]
SMALL = ["--ctx", "32", "--backend", "auto"]
QUANTIZE = [*SMALL, "--windows", "4", "--code", "1mad", "--L", "4", "--layers", ",".join(LAYERS)]
TRAIN = [*SMALL, "--windows", "8", "--batch", "2", "--steps", "4", "--warmup", "1", "--lr", "0.15"]
TRAIN += [
    "--estimator",
    "soft",
    "--start",
    "0",
    "--save-every",
    "2",
    "--measure-every",
    "2",
    "--reencode-every",
    "3",
]


@dataclass(frozen=True)
class Result:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a command that failed, after checking its form: one line, the last."""
        *before, last = self.err.splitlines()
        assert last.startswith("softtrellis: error: "), self.err
        assert not [line for line in before if line.startswith("softtrellis:")], self.err
        assert "Traceback" not in self.err
        return last.removeprefix("softtrellis: error: ")


Command = Callable[..., Result]
Refused = Callable[..., str]
Start = Callable[[Path], list[str | Path]]
Interrupt = Callable[..., None]


def contents(directory: Path) -> dict[str, bytes]:
    """All files under a directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
