"""Weight matrices to 16x16 tiles in a fixed element order, and back."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from softtrellis.spec import TILE_SIDE, TILE_WEIGHTS, TrellisSpec

TileOrder = Literal["rows", "exl3"]


@lru_cache(maxsize=4)
def _element_order(order: TileOrder) -> tuple[int, ...]:
    """Position in the trellis to index in the flattened [16 out, 16 in] tile."""
    if order == "rows":
        return tuple(range(TILE_WEIGHTS))
    index = []
    for position in range(TILE_WEIGHTS):
        t, j = divmod(position, 8)
        row_in = 2 * (t % 4) + (0, 1, 8, 9)[j % 4]
        row_out = t // 4 + 8 * (j // 4)
        index.append(row_out * TILE_SIDE + row_in)
    return tuple(index)


def check_order(order: str) -> None:
    """ValueError if the tile order is unknown."""
    if order not in get_args(TileOrder):
        raise ValueError(f"unknown tile order {order!r}; use 'rows' or 'exl3'")


def to_tiles(weight: Tensor, spec: TrellisSpec, order: TileOrder) -> Tensor:
    """[out, in] to [B, N, V]: tiles run over output blocks first, then input blocks.

    Args:
        weight: [out, in], both multiples of 16.
        spec: gives V.
        order: the elements' order inside a tile: "rows" (QTIP: along the inputs, then down the
            outputs) or "exl3" (EXL3's tensor core order).
    """
    rows, columns = weight.shape
    if rows % TILE_SIDE or columns % TILE_SIDE:
        raise ValueError(
            f"weight must have multiples of {TILE_SIDE} as dimensions, got {rows}x{columns}"
        )
    tiles = weight.reshape(rows // TILE_SIDE, TILE_SIDE, columns // TILE_SIDE, TILE_SIDE)
    flat = tiles.transpose(1, 2).reshape(-1, TILE_WEIGHTS)
    index = torch.tensor(_element_order(order), device=weight.device)
    return flat[:, index].reshape(-1, spec.steps(), spec.V)


def from_tiles(tiles: Tensor, out_features: int, in_features: int, order: TileOrder) -> Tensor:
    """[B, N, V] to [out, in], the inverse of ``to_tiles``."""
    index = torch.tensor(_element_order(order), device=tiles.device)
    flat = tiles.reshape(-1, TILE_WEIGHTS)[:, index.argsort()]
    blocks = flat.reshape(out_features // TILE_SIDE, in_features // TILE_SIDE, TILE_SIDE, TILE_SIDE)
    return blocks.transpose(1, 2).reshape(out_features, in_features)
