"""QTIP's tail-biting paths from a search for paths with free and with pinned ends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bitshift import overlap_in


def two_passes(
    w: Tensor, spec: TrellisSpec, search: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """The tile rolled by half with free ends, then pinned to the overlap at its seam.

    Args:
        w: [B, N, V].
        spec: the trellis.
        search: the best path, int32 [B, N], of weights [B, N, V] and overlaps int64 [B] or None.

    Returns:
        int32 [B, N], closed paths (QTIP, algorithm 4).
    """
    half = w.shape[1] // 2
    rolled = search(w.roll(-half, dims=1), None)
    seam = overlap_in(rolled[:, -half if half else 0], spec).to(torch.int64)
    return search(w, seam)
