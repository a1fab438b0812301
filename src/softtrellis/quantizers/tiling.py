"""Weight matrices to 16x16 tiles in a fixed element order, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from softtrellis.spec import TILE_SIDE, TrellisSpec

TileOrder = Literal["rows", "exl3"]

# A matrix as [out blocks, 2, 8, in blocks, 2, 4, 2], and its axes in the order of the tiles. EXL3:
# position 8 t + j of a tile is out t // 4 + 8 (j // 4) and in 2 (t % 4) + (0, 1, 8, 9)[j % 4].
_AXES: dict[TileOrder, tuple[int, ...]] = {
    "rows": (0, 3, 1, 2, 4, 5, 6),
    "exl3": (0, 3, 2, 5, 1, 4, 6),
}


def _split(rows: int, columns: int) -> tuple[int, ...]:
    return rows // TILE_SIDE, 2, 8, columns // TILE_SIDE, 2, 4, 2


def check_order(order: str) -> None:
    """ValueError if the tile order is unknown."""
    if order not in get_args(TileOrder):
        raise ValueError(f"unknown tile order {order!r}; use 'rows' or 'exl3'")


def to_tiles(weight: Tensor, spec: TrellisSpec, order: TileOrder) -> Tensor:
    """[..., out, in] to [..., B, N, V]: tiles run over output blocks first, then input blocks.

    Args:
        weight: [..., out, in], both multiples of 16.
        spec: gives V.
        order: the elements' order inside a tile: "rows" (QTIP: along the inputs, then down the
            outputs) or "exl3" (EXL3's tensor core order).
    """
    *stack, rows, columns = weight.shape
    if rows % TILE_SIDE or columns % TILE_SIDE:
        raise ValueError(
            f"weight must have multiples of {TILE_SIDE} as dimensions, got {rows}x{columns}"
        )
    blocks = weight.reshape(*stack, *_split(rows, columns))
    blocks = blocks.permute(_stacked(_AXES[order], len(stack)))
    return blocks.reshape(*stack, -1, spec.steps(), spec.V)


def from_tiles(tiles: Tensor, out_features: int, in_features: int, order: TileOrder) -> Tensor:
    """[..., B, N, V] to [..., out, in], the inverse of ``to_tiles``."""
    split, axes, stack = _split(out_features, in_features), _AXES[order], tiles.shape[:-3]
    blocks = tiles.reshape(*stack, *(split[axis] for axis in axes))
    back = [axes.index(axis) for axis in range(len(axes))]
    blocks = blocks.permute(_stacked(back, len(stack)))
    return blocks.reshape(*stack, out_features, in_features)


def _stacked(axes: Sequence[int], dimensions: int) -> list[int]:
    """Axes of a matrix behind the dimensions of a stack of matrices, which stay in front."""
    return [*range(dimensions), *(dimensions + axis for axis in axes)]
