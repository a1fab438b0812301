"""Brute force over every path of a tiny trellis."""

from __future__ import annotations

import torch
from torch import Tensor

from softtrellis.spec import TrellisSpec


def all_paths(spec: TrellisSpec, steps: int) -> Tensor:
    """int64 [P, N]: every path with free ends."""
    paths = torch.arange(spec.num_states).unsqueeze(1)
    symbols = torch.arange(spec.num_branches)
    for _ in range(steps - 1):
        following = ((paths[:, -1:] << spec.shift) | symbols) % spec.num_states
        paths = torch.cat(
            [
                paths.repeat_interleave(spec.num_branches, dim=0),
                following.reshape(-1, 1),
            ],
            dim=1,
        )
    return paths


def admitted(paths: Tensor, spec: TrellisSpec, ends: str | int) -> Tensor:
    """The paths that the ends allow: "free", "tail_biting" or one overlap."""
    first, last = paths[:, 0] >> spec.shift, paths[:, -1] % spec.num_overlaps
    if ends == "free":
        return paths
    if ends == "tail_biting":
        return paths[first == last]
    return paths[(first == ends) & (last == ends)]


def energies(paths: Tensor, w: Tensor, codebook: Tensor) -> Tensor:
    """[P]: squared error of every path against one tile w [N, V]."""
    return (codebook[paths] - w).square().sum((1, 2))


def boltzmann(
    paths: Tensor, w: Tensor, codebook: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """values [N, V], log_z [], entropy [N] by summing over the paths."""
    score = -energies(paths, w, codebook) / temperature
    share = torch.softmax(score, 0)
    values = (share[:, None, None] * codebook[paths]).sum(0)
    marginal = torch.zeros(w.shape[0], codebook.shape[0], dtype=w.dtype)
    for t in range(w.shape[0]):
        marginal[t].index_add_(0, paths[:, t], share)
    return values, torch.logsumexp(score, 0), -torch.special.xlogy(marginal, marginal).sum(1)
