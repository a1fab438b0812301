"""Scalar rounding: what Viterbi with the code "scalar" comes to."""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_nearest(weight: Tensor, levels: Tensor) -> Tensor:
    """Each weight to the nearest of the sorted levels [K]; shape and dtype of ``weight``."""
    levels = levels.to(weight)
    nearest: Tensor = levels[torch.bucketize(weight, (levels[1:] + levels[:-1]) / 2)]
    return nearest
