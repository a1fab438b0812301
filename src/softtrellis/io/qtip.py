"""QTIP's checkpoints: recognised, and refused with the reasons."""

from __future__ import annotations

from pathlib import Path

from softtrellis.io.manifest import CheckpointError
from softtrellis.io.tensor_files import read_json


def refuse_qtip(directory: Path) -> None:
    """CheckpointError if a directory holds a checkpoint of QTIP.

    What is published of the format is not enough to read one safely: files for QTIP's kernel hold
    tiles in another order of elements and bytes without saying so, and which Hadamard matrices
    stand for dimensions that are not powers of two is not said either.
    """
    if (directory / "config.json").is_file() and "quip_params" in read_json(
        directory / "config.json"
    ):
        raise CheckpointError(
            f"{directory} is a checkpoint of QTIP, which cannot be imported: its files do not say "
            "whether their tiles are in the order of QTIP's kernel, nor which Hadamard matrices "
            "they use; quantize the full-precision model instead"
        )
