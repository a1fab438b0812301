"""States, overlaps and paths of the bitshift trellis (QTIP, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from softtrellis.spec import TrellisSpec


def overlap_in(states: Tensor, spec: TrellisSpec) -> Tensor:
    """The overlap shared with the previous state: the high ``L - kV`` bits. int [...]."""
    return states >> spec.shift


def overlap_out(states: Tensor, spec: TrellisSpec) -> Tensor:
    """The overlap shared with the next state: the low ``L - kV`` bits. int [...]."""
    return states & (spec.num_overlaps - 1)


def check_path(states: Tensor, spec: TrellisSpec, *, tail_biting: bool = False) -> None:
    """ValueError if int states [B, N] are not paths, or do not close where they should."""
    if states.ndim != 2 or states.shape[1] < 1 or states.dtype.is_floating_point:
        raise ValueError(f"states must be integers [B, N], got {states.dtype} {list(states.shape)}")
    if states.numel() and not 0 <= int(states.min()) <= int(states.max()) < spec.num_states:
        raise ValueError(f"states must lie in [0, {spec.num_states})")
    leaves, enters = overlap_out(states, spec), overlap_in(states, spec)
    if not torch.equal(leaves[:, :-1], enters[:, 1:]):
        raise ValueError("states are not a path of this trellis: neighbours do not overlap")
    if tail_biting and not torch.equal(leaves[:, -1], enters[:, 0]):
        raise ValueError(
            "the path is not tail-biting: its last state does not lead back to its first; "
            "find it with viterbi(..., ends='tail_biting')"
        )
