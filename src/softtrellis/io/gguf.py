"""The header of a GGUF file from anywhere: read within the file's bounds, and checked."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
_MOST_DIMENSIONS, _MOST_NESTING = 4, 4
_LEAST_BITS = 1
"""Bits of a weight that no GGUF type goes below."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        values: the metadata, without arrays.
        shapes: the shape of every tensor by name, as the file lists it.
    """

    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def elements(self) -> int:
        """Numbers in all tensors."""
        return sum(map(math.prod, self.shapes.values()))

    def text(self, key: str, default: str = "") -> str:
        """The string of a key."""
        value = self.values.get(key, default)
        return value if isinstance(value, str) else default


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads metadata and shapes; takes time and memory in proportion to the header at most.

    Raises:
        ValueError: not a little-endian GGUF file of version 2 or 3, cut short, or one that claims
            more than it holds.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"'{path}' is not a GGUF file.")
        reader = _Reader(file, path.stat().st_size)
        try:
            version, tensors, keys = reader.unpack("<IQQ")
            if version not in (2, 3):
                raise ValueError(f"'{path}' has GGUF version {version}; 2 and 3 can be read.")
            values = dict(reader.entry() for _ in range(keys))
            shapes = dict(reader.shape() for _ in range(tensors))
        except (_DamagedError, struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"'{path}' is damaged: its GGUF header cannot be read.") from error
        header = GgufHeader({k: v for k, v in values.items() if v is not None}, shapes)
        _check_claims(header, path, reader.size)
    return header


def _check_claims(header: GgufHeader, path: Path, size: int) -> None:
    """ValueError if a file has not the bytes for its tensors, or not the tensors for its layers."""
    if header.elements * _LEAST_BITS > 8 * size:
        raise ValueError(
            f"'{path}' lists {header.elements:,} weights in {size:,} bytes: it is damaged."
        )
    count = header.values.get(f"{header.text('general.architecture')}.block_count", 0)
    if not isinstance(count, int) or not 0 <= count <= len(header.shapes):
        raise ValueError(
            f"'{path}' claims {count} layers and has {len(header.shapes)} tensors: it is damaged."
        )


class _DamagedError(Exception):
    """A header that its file cannot hold."""


class _Reader:
    """Reads the parts of a header, never beyond the file's end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.file.read(struct.calcsize(layout)))

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise _DamagedError
        self.file.seek(count, 1)

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        if length > self.size - self.file.tell():
            raise _DamagedError
        return self.file.read(length).decode()

    def entry(self) -> tuple[str, Any]:
        """A key with its value; None is the value of an array."""
        key = self.string()
        (kind,) = self.unpack("<I")
        if kind == _STRING:
            return key, self.string()
        if kind == _ARRAY:
            self.skip_array(_MOST_NESTING)
            return key, None
        return key, self.unpack(f"<{_layout(kind)}")[0]

    def skip_array(self, nesting: int) -> None:
        kind, count = self.unpack("<IQ")
        if kind == _ARRAY and not nesting:
            raise _DamagedError
        if kind not in (_STRING, _ARRAY):
            self.skip(count * struct.calcsize(f"<{_layout(kind)}"))
            return
        for _ in range(count):  # every element takes bytes, so that the file's end ends this
            if kind == _STRING:
                self.skip(*self.unpack("<Q"))
            else:
                self.skip_array(nesting - 1)

    def shape(self) -> tuple[str, tuple[int, ...]]:
        name = self.string()
        (dimensions,) = self.unpack("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise _DamagedError
        shape = self.unpack(f"<{dimensions}Q")
        self.unpack("<IQ")
        return name, shape


def _layout(kind: int) -> str:
    if kind not in _SCALARS:
        raise _DamagedError
    return _SCALARS[kind]
