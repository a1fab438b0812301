"""Seeds of random numbers."""

from __future__ import annotations

import torch

_SEEDS = 2**63


def check_seed(seed: int) -> None:
    """ValueError unless it is from 0 to 2**63 - 1."""
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Random numbers on the CPU, others for every epoch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % _SEEDS)
