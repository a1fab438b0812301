"""Tiles and their element orders."""

from __future__ import annotations

import pytest
import torch

from softtrellis.quantizers.tiling import TileOrder, from_tiles, to_tiles
from softtrellis.spec import TrellisSpec


@pytest.mark.parametrize("order", ["rows", "exl3"])
@pytest.mark.parametrize("V", [1, 2])
def test_round_trip(order: str, V: int) -> None:
    weight = torch.arange(48 * 32.0).reshape(48, 32)
    tiles = to_tiles(weight, TrellisSpec(8, 1, V), order)  # type: ignore[arg-type]
    assert tiles.shape == (6, 256 // V, V)
    assert torch.equal(from_tiles(tiles, 48, 32, order), weight)  # type: ignore[arg-type]


def test_rows_order_runs_along_the_inputs() -> None:
    weight = torch.arange(16 * 32.0).reshape(16, 32)
    tiles = to_tiles(weight, TrellisSpec(8, 2, 1), "rows")
    assert tiles[1, :17, 0].tolist() == [*range(16, 32), 48]


def test_exl3_order_is_the_documented_one() -> None:
    weight = torch.arange(256.0).reshape(16, 16)
    tile = to_tiles(weight, TrellisSpec(8, 2, 1), "exl3")[0, :, 0]
    for position in range(256):
        t, j = position // 8, position % 8
        inner = 2 * (t % 4) + [0, 1, 8, 9][j % 4]
        outer = t // 4 + 8 * (j // 4)
        assert tile[position] == weight[outer, inner]
    assert sorted(tile.tolist()) == list(range(256))


def test_dimensions_that_are_no_multiples() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        to_tiles(torch.zeros(16, 20), TrellisSpec(8, 2, 1), "rows")


@pytest.mark.parametrize("order", ["rows", "exl3"])
def test_stacks_are_their_matrices(order: TileOrder) -> None:
    weights = torch.arange(2 * 3 * 48 * 32.0).reshape(2, 3, 48, 32)
    tiles = to_tiles(weights, TrellisSpec(8, 1, 2), order)
    assert tiles.shape == (2, 3, 6, 128, 2)
    assert torch.equal(tiles[1, 2], to_tiles(weights[1, 2], TrellisSpec(8, 1, 2), order))
    assert torch.equal(from_tiles(tiles, 48, 32, order), weights)
