"""The log of a run, and the state from which an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softtrellis.io.errors import DAMAGED
from softtrellis.io.files import STATE, whole_file, write_text

LOG = "log.jsonl"
DIGESTS = ("checkpoint", "text")
"""Settings that are a ``digest`` of what the run works on."""


class RunLog:
    """One JSON object per training step, kept in memory and appended to ``log.jsonl``."""

    def __init__(self, directory: Path | None, *, resume_at: int = 0) -> None:
        """Starts anew, or keeps the records of the steps before ``resume_at``.

        Raises:
            ValueError: some of these are missing or damaged.
        """
        self.records: list[dict[str, Any]] = []
        self.path = None if directory is None else directory / LOG
        if self.path is None:
            return
        if resume_at:
            self.records = _first_records(self.path, resume_at)
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))

    @property
    def seconds(self) -> float:
        """Training time up to the last record."""
        return float(self.records[-1]["seconds"]) if self.records else 0.0

    def append(self, record: dict[str, Any]) -> None:
        """Adds a step."""
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _first_records(path: Path, count: int) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines[:count]]
        if len(records) < count or not all(record["step"] == i for i, record in enumerate(records)):
            raise ValueError(f"it does not have the steps 0 to {count - 1}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); start over with --force") from error
    return records


def digest(tensors: Iterable[Tensor]) -> str:
    """A short hash of tensors' bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def sampled(tensor: Tensor) -> Tensor:
    """Evenly spaced values of a tensor, fewer than 2048: enough to know it by."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 1024)].contiguous()


def save_state(
    directory: Path, tensors: Mapping[str, Tensor], *, step: int, settings: Mapping[str, Any]
) -> None:
    """Writes the tensors of a run after ``step`` steps, whole or not at all."""
    metadata = {"step": str(step), "settings": json.dumps(settings, sort_keys=True)}
    write_tensors(directory / STATE, tensors, metadata)


def load_state(directory: Path, *, settings: Mapping[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """(steps done, tensors); (0, {}) where nothing was saved.

    Raises:
        ValueError: the state is damaged, or was saved with other settings (named).
    """
    path = directory / STATE
    if not path.is_file():
        return 0, {}
    metadata, tensors = read_tensors(path, torch.device("cpu"))
    try:
        step, saved = int(metadata["step"]), dict(json.loads(metadata["settings"]))
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged ({error}); start over with --force") from error
    check_settings(saved, json.loads(json.dumps(settings, sort_keys=True)), digests=DIGESTS)
    return step, tensors


def check_settings(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, digests: tuple[str, ...] = ()
) -> None:
    """ValueError, naming the first that differs, unless a run is resumed with its own settings.

    Both are as JSON gives them back; of ``digests`` the values are not shown.
    """
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            what = f"{name}={saved.get(name)!r}, this one has {now.get(name)!r}"
            raise ValueError(
                f"the interrupted run had {f'another {name}' if name in digests else what}; "
                "resume with the same settings, or start over with --force"
            )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as beside:
        save_file(stored, str(beside), metadata=metadata)


def read_tensors(path: Path, device: torch.device) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors that ``write_tensors`` wrote; ValueError if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt", device=str(device)) as file:
            tensors = {n: torch.clone(file.get_tensor(n)) for n in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); start over with --force") from error
