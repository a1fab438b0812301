"""Reading the safetensors files of a directory that someone else wrote."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from softtrellis.io.manifest import WEIGHTS, CheckpointError, is_plain_name

INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: no such file, or no JSON object in it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the model again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged ({reason}); copy the model again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy the model again")
    return value


def files_in_index(directory: Path) -> dict[str, str]:
    """File names by tensor; empty where there is one file and no index.

    Raises:
        CheckpointError: the index is damaged, or names something else than a safetensors file in
            the same directory.
    """
    if not (directory / INDEX).is_file():
        return {}
    listed = read_json(directory / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{directory / INDEX} lists no tensors")
    for file in listed.values():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{directory / INDEX} names {file!r}, which is no safetensors file "
                "beside it; do not use this model"
            )
    return listed


class TensorFiles:
    """The tensors in ``model.safetensors``, or in the files that an index lists; a context.

    Shapes are read from the files' headers, values only by ``get``. File names in the index must
    be names in the same directory.

    Attributes:
        shapes: the shape of every tensor by name.
        dtypes: its dtype as safetensors calls it, "BF16" for instance.
    """

    def __init__(self, directory: Path, *, index: bool = True) -> None:
        """Opens the files; without ``index`` the one file, whatever an index says.

        Raises:
            CheckpointError: a file is missing or damaged, or the index names another place.
        """
        self._directory = directory
        self._files: dict[str, tuple[str, Any]] = {}
        self._stack = ExitStack()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        try:
            listed = files_in_index(directory) if index else {}
            for file in sorted(set(listed.values())) if listed else [WEIGHTS]:
                self._open(file)
        except BaseException:
            self._stack.close()
            raise
        for name, file in listed.items():
            if name not in self._files or self._files[name][0] != file:
                self._stack.close()
                raise CheckpointError(
                    f"{directory / file} lacks {name}, which {INDEX} lists; copy the model again"
                )

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def get(self, name: str) -> Tensor:
        """The values of a tensor; CheckpointError if they cannot be had."""
        from safetensors import SafetensorError

        file, handle = self._files[name]
        try:
            tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            path = self._directory / file
            raise CheckpointError(f"{name} in {path} cannot be read: {error}") from error
        return tensor

    def _open(self, file: str) -> None:
        from safetensors import SafetensorError, safe_open

        path = self._directory / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the model again")
        try:
            handle = self._stack.enter_context(safe_open(str(path), "pt"))
            for name in handle.keys():  # noqa: SIM118
                if name in self._files:
                    raise CheckpointError(f"{name} is in two files of {self._directory}")
                self._files[name] = (file, handle)
                header = handle.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(header.get_shape()), header.get_dtype()
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} cannot be read: {error}; copy it again") from error
