"""The log of a run, and the state from which an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softtrellis.io.errors import DAMAGED
from softtrellis.io.files import STATE, remove, whole_file, write_text
from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.recipes.ranks import ONE, Ranks
from softtrellis.recipes.sharded_state import (
    SharedTensors,
    load_shared,
    own_part,
    save_shared,
    shared_in,
)

LOG = "log.jsonl"
DIGESTS = ("checkpoint", "text")
"""Settings that are a ``digest`` of what the run works on."""

_SHARED = "train_state-*"
_SHARED_NAME = re.compile(r"train_state-[0-9a-f]{8}")


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


@dataclass(frozen=True, eq=False)
class SavedState:
    """What a run goes on from.

    Attributes:
        step: how many are done; 0 where nothing was saved.
        tensors: by name, on the CPU.
        shared: what several ranks shared, and each of them wrote its part of.
    """

    step: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    shared: SharedTensors | None = None

    def part(
        self, prefix: str, layers: Mapping[str, LatentLinear], ranks: Ranks
    ) -> dict[str, Tensor]:
        """The tensors whose names start with ``prefix``, which is taken off; empty if none.

        Of what belongs to the tiles of ``layers``, this rank's part. All ranks call it together.

        Raises:
            ValueError: what was shared is damaged.
        """
        whole = {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}
        if self.shared is None or not whole:
            return own_part(whole, layers)
        return whole | load_shared(self.shared, prefix, layers, ranks)


def save_state(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    step: int,
    settings: Mapping[str, Any],
    ranks: Ranks = ONE,
) -> None:
    """Writes the tensors of a run after ``step`` steps, whole or not at all.

    Rank 0 writes one file. With several ranks, which call this together, each of them writes its
    part of the ``DTensor``s into a new directory, which the file names. The state before is
    there until this one is.
    """
    metadata = {"step": str(step), "settings": json.dumps(settings, sort_keys=True)}
    shared = shared_in(tensors) if ranks.size > 1 else {}
    new: Path | None = None
    if shared:
        new = directory / ranks.once(partial(_new_directory, directory))
        metadata |= {"shared": new.name, "shared_names": json.dumps(sorted(shared))}
        try:
            save_shared(new, shared, ranks)
        except BaseException:
            if ranks.first:
                shutil.rmtree(new, ignore_errors=True)
            raise
    own = {name: tensor for name, tensor in tensors.items() if name not in shared}
    ranks.once(partial(_publish, directory, own, metadata))


def _new_directory(directory: Path) -> str:
    _tidy(directory)
    name = _SHARED.replace("*", secrets.token_hex(4))
    (directory / name).mkdir()
    return name


def _publish(directory: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    write_tensors(directory / STATE, tensors, metadata)
    _tidy(directory)


def _tidy(directory: Path) -> None:
    """Removes the directories of older states, and what a killed run did not finish."""
    named = None
    if (directory / STATE).is_file():
        named = read_metadata(directory / STATE).get("shared")
    for path in directory.glob(_SHARED):
        if path.name != named:
            remove(path)


def load_state(directory: Path, *, settings: Mapping[str, Any]) -> SavedState:
    """What ``save_state`` wrote; what ranks shared is not read yet.

    Raises:
        ValueError: the state is damaged, or was saved with other settings (named).
    """
    path = directory / STATE
    if not path.is_file():
        return SavedState()
    metadata, tensors = read_tensors(path, torch.device("cpu"))
    try:
        step, saved = int(metadata["step"]), dict(json.loads(metadata["settings"]))
        shared = _shared_of(directory, metadata)
    except (*DAMAGED, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); start over with --force") from error
    check_settings(saved, json.loads(json.dumps(settings, sort_keys=True)), digests=DIGESTS)
    return SavedState(step, tensors, shared)


def _shared_of(directory: Path, metadata: Mapping[str, str]) -> SharedTensors | None:
    if "shared" not in metadata:
        return None
    name, names = metadata["shared"], json.loads(metadata["shared_names"])
    if not _SHARED_NAME.fullmatch(name):
        raise ValueError(f"it names {name!r}, which is no directory of a state beside it")
    return SharedTensors(directory / name, frozenset(map(str, names)))


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


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata that ``write_tensors`` wrote; ValueError if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            return metadata
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); start over with --force") from error
