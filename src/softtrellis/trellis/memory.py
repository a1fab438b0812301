"""Calls on many tiles that take fewer at once where the device's memory does not suffice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from softtrellis.trellis.validation import values_are_readable

_log = logging.getLogger(__name__)


class TilesAtOnce:
    """How many tiles the calls of an operation take at once: all of them, until memory runs out.

    Attributes:
        name: of the operation, for the warning.
        most: tiles at once after memory ran out, by device, trellis and steps.
        halvings: how often memory ran out.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.most: dict[Hashable, int] = {}
        self.halvings = 0

    def run(
        self, call: Callable[[slice], tuple[Tensor, ...]], w: Tensor, problem: Hashable
    ) -> list[tuple[Tensor, ...]]:
        """``call`` of consecutive parts of w's tiles, as many at once as memory has held so far.

        When it runs out, the tiles that are left, and those of later calls, are taken half as many
        at once. A warning says so once for each problem. A captured CUDA graph cannot be cut anew:
        there the error stands.

        Args:
            call: of a slice of the batch.
            w: [B, N, V], the tiles.
            problem: what besides N and the device says how much memory a tile needs.

        Raises:
            torch.OutOfMemoryError: memory does not suffice for one tile.
        """
        batch, key = w.shape[0], (w.device, w.shape[1], problem)
        results: list[tuple[Tensor, ...]] = []
        first, before = 0, self.halvings
        while first < batch or not results:
            size = min(self.most.get(key, batch), batch)
            try:
                results.append(call(slice(first, min(first + size, batch))))
                first += size
                continue
            except torch.OutOfMemoryError:
                if size <= 1 or not values_are_readable(w):
                    raise
            # Here, outside the handler, nothing holds the tensors of the call that failed.
            self.most[key] = size // 2
            self.halvings += 1
        if self.halvings > before:
            _log.warning(
                f"out of memory: {self.name} takes {self.most[key]:,} tiles at once from now on"
            )
        return results


BCJR, BCJR_BACKWARD, VITERBI = map(TilesAtOnce, ("BCJR", "BCJR's backward pass", "Viterbi"))


def halvings() -> int:
    """How often the tiles taken at once were halved in this process because memory ran out."""
    return BCJR.halvings + BCJR_BACKWARD.halvings + VITERBI.halvings
