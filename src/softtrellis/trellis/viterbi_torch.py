"""Viterbi in plain PyTorch: the reference recursion over the max semiring."""

from __future__ import annotations

import torch
from torch import Tensor

from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bitshift import overlap_in
from softtrellis.trellis.reference import (
    Element,
    MaxSemiring,
    boundary,
    forward_messages,
    log_weights,
)

_CHUNK_ELEMENTS = 1 << 24


def best_path(w: Tensor, codebook: Tensor, spec: TrellisSpec, pins: Tensor | None) -> Tensor:
    """The path of least squared error.

    Keeps the messages and no backpointers: the choice between a state's R predecessors is made
    again along the traced path only.

    Args:
        w: float [B, N, V].
        codebook: float [S, V].
        spec: the trellis.
        pins: int64 [B], the overlap at both ends, or None for free ends.

    Returns:
        int32 [B, N], the states.
    """
    per_tile = max(spec.num_states * spec.V, (w.shape[1] + 1) * spec.num_overlaps)
    chunk = max(1, _CHUNK_ELEMENTS // per_tile)
    parts = [
        _best_path(w[i : i + chunk], codebook, spec, None if pins is None else pins[i : i + chunk])
        for i in range(0, w.shape[0], chunk)
    ]
    return torch.cat(parts) if parts else w.new_zeros(0, w.shape[1], dtype=torch.int32)


def _best_path(w: Tensor, codebook: Tensor, spec: TrellisSpec, pins: Tensor | None) -> Tensor:
    ends, one = boundary(w, spec, pins), w.new_ones(w.shape[0])

    def weights(t: int) -> Element:
        return (log_weights(w[:, t], codebook, one),)

    steps = w.shape[1]
    alpha = forward_messages((ends,), weights, steps, MaxSemiring(), spec)
    overlap = (alpha[-1][0] + ends).argmax(1)
    top = torch.arange(spec.num_branches, device=w.device) * spec.num_overlaps
    states = torch.empty(w.shape[:2], dtype=torch.int32, device=w.device)
    for t in reversed(range(steps)):
        candidates = top + overlap.unsqueeze(1)
        error = (codebook[candidates] - w[:, t].unsqueeze(1)).square().sum(-1)
        score = alpha[t][0].gather(1, overlap_in(candidates, spec)) - error
        state = candidates.gather(1, score.argmax(1, keepdim=True)).squeeze(1)
        states[:, t] = state
        overlap = overlap_in(state, spec)
    return states
