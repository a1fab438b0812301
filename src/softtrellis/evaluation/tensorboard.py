"""A run's log for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from softtrellis.extras import install

FOLDER = "tensorboard"


class TensorBoardLog:
    """Writes the records of ``log.jsonl`` as scalars into ``directory/tensorboard``.

    A record's numbers go to ``train/KEY``, those of its layers to ``KEY/LAYER``, at the record's
    step. ``tensorboard --logdir DIRECTORY`` shows them. Use it in a ``with`` statement, or call
    ``close`` at the end: before that, the last records may not be on disk.
    """

    def __init__(self, directory: Path, *, resume_at: int = 0) -> None:
        """Opens the folder.

        Args:
            directory: of the run.
            resume_at: the first step that will be written; later ones of an interrupted run
                are no longer shown.

        Raises:
            ImportError: the package tensorboard is not installed.
        """
        if find_spec("tensorboard") is None:
            raise ImportError(
                f"a log for TensorBoard needs the package tensorboard; {install('tensorboard')}"
            )
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / FOLDER
        self._writer = SummaryWriter(str(folder), purge_step=resume_at or None)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a step: a record as ``RunLog.append`` takes it."""
        step = int(record["step"])
        for key, value in record.items():
            if key not in ("step", "layers"):
                self._add(f"train/{key}", value, step)
        for name, measured in record.get("layers", {}).items():
            for key, value in measured.items():
                self._add(f"{key}/{name}", value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, tag: str, value: Any, step: int) -> None:
        if isinstance(value, int | float):
            self._writer.add_scalar(tag, value, step)
