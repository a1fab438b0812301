"""The tables of the codes that are not computed, as checkpoints store them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from softtrellis.codes.codebook import WHOLE_CODES
from softtrellis.codes.hybrid import TABLE_ROWS, table_of
from softtrellis.io.claims import check_packed
from softtrellis.io.manifest import CheckpointError, codes_of
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.quantizers.hard import TrellisCode

TABLE = "softtrellis.table"
"""What the names of all tables start with."""


def table_name(index: int) -> str:
    """The tensor with the table of a checkpoint's code of this number: the first has none."""
    return f"{TABLE}.{index}" if index else TABLE


def stored_tables(layers: Mapping[str, QuantizedLinear]) -> dict[str, Tensor]:
    """The tables of the layers' codes by tensor name, on the CPU.

    Raises:
        ValueError: layers of one code with different tables.
    """
    codes = codes_of({name: layer.layer for name, layer in layers.items()})
    tables: dict[str, Tensor] = {}
    for layer in layers.values():
        code = layer.layer.code
        table, name = _table(code, layer.codebook), table_name(codes.index(code))
        if table is not None and not torch.equal(tables.setdefault(name, table), table):
            raise ValueError(f"layers of the same code {code} have different tables")
    return tables


def codebooks_of(
    codes: Sequence[TrellisCode], tables: Mapping[str, Tensor]
) -> dict[TrellisCode, Tensor]:
    """The codebooks that ``stored_tables`` was taken from, bit for bit.

    Raises:
        CheckpointError: a table is missing, of another shape, or not finite.
    """
    return {code: _codebook(code, tables.get(table_name(i))) for i, code in enumerate(codes)}


def read_tables(files: Sequence[Path]) -> tuple[dict[str, Tensor], set[str]]:
    """The codes' tables in safetensors files, on the CPU, and the names of all tensors there."""
    from safetensors import safe_open

    tables: dict[str, Tensor] = {}
    names: set[str] = set()
    for path in files:
        with safe_open(str(path), "pt") as file, torch.device("cpu"):
            stored = set(file.keys())
            names |= stored
            tables |= {key: file.get_tensor(key) for key in stored if key.startswith(TABLE)}
    return tables, names


def _table(code: TrellisCode, codebook: Tensor) -> Tensor | None:
    """What of a codebook is not computed: [512, 2] of "hyb", [S, V] of ``WHOLE_CODES``."""
    if code.name in WHOLE_CODES:
        return codebook.detach().cpu().clone()
    if code.name != "hyb":
        return None
    return table_of(codebook.detach().cpu(), code.spec, code.flip)


def _codebook(code: TrellisCode, table: Tensor | None) -> Tensor:
    if code.name not in ("hyb", *WHOLE_CODES):
        return code.codebook()
    if table is None:
        raise CheckpointError(
            f"the checkpoint lacks the table of code {code.name!r}; copy it again"
        )
    shape = (code.spec.num_states, code.spec.V) if code.name in WHOLE_CODES else (TABLE_ROWS, 2)
    if tuple(table.shape) != shape or table.dtype != torch.float32:
        raise CheckpointError(
            f"the table of code {code.name!r} is {table.dtype} {list(table.shape)} and must be "
            f"float32 {list(shape)}; copy the checkpoint again"
        )
    check_packed(f"the table of code {code.name!r}", table, torch.float32)
    if code.name in WHOLE_CODES:
        return table
    return TrellisCode(code.spec, code.name, code.flip, normalize=False).codebook(table)
