"""Tail-biting paths to bits and back: exactly k bits per weight, nothing else per tile."""

from __future__ import annotations

import torch
from torch import Tensor

from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bitshift import check_path

_WORD = 16


def words_per_tile(spec: TrellisSpec, steps: int) -> int:
    """16-bit words that hold one packed tile."""
    return -(-steps * spec.shift // _WORD)


def pack(states: Tensor, spec: TrellisSpec) -> Tensor:
    """Packs tail-biting paths (QTIP, section 4.2).

    The cyclic stream holds the kV oldest bits of each state, so that state t is the L bits that
    start at bit t * kV. Bits are most significant first; the last word is padded with zeros.

    Args:
        states: int [B, N], tail-biting paths.
        spec: the trellis.

    Returns:
        int16 [B, ceil(k V N / 16)].

    Raises:
        ValueError: states that are not tail-biting paths.
    """
    check_path(states, spec, tail_biting=True)
    batch, steps = states.shape
    symbols = states.to(torch.int32) >> (spec.L - spec.shift)
    bit = torch.arange(spec.shift - 1, -1, -1, dtype=torch.int32, device=states.device)
    bits = ((symbols.unsqueeze(-1) >> bit) & 1).reshape(batch, steps * spec.shift)
    padded = bits.new_zeros(batch, words_per_tile(spec, steps) * _WORD)
    padded[:, : bits.shape[1]] = bits
    place = torch.arange(_WORD - 1, -1, -1, dtype=torch.int32, device=states.device)
    words = (padded.reshape(batch, -1, _WORD) << place).sum(-1, dtype=torch.int32)
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def unpack(words: Tensor, spec: TrellisSpec, *, steps: int) -> Tensor:
    """Unpacks what ``pack`` made.

    Args:
        words: int16 [B, ceil(k V N / 16)].
        spec: the trellis.
        steps: N, the steps per tile.

    Returns:
        int32 [B, N], the states.

    Raises:
        ValueError: words whose dtype or width does not fit the trellis and the steps.
    """
    if words.dtype != torch.int16 or words.ndim != 2:
        raise ValueError(f"words must be int16 [B, W], got {words.dtype} {list(words.shape)}")
    if steps < 1 or words.shape[1] != words_per_tile(spec, steps):
        raise ValueError(
            f"{steps} steps of {spec} take {words_per_tile(spec, steps)} words per tile, "
            f"got {words.shape[1]}"
        )
    if steps * spec.shift % _WORD == 0:
        return _windows(words, spec, steps)
    batch = words.shape[0]
    place = torch.arange(_WORD - 1, -1, -1, device=words.device)
    bits = ((words.to(torch.int32).unsqueeze(-1) >> place) & 1).reshape(batch, -1)
    bit = torch.arange(spec.shift - 1, -1, -1, device=words.device)
    symbols = bits[:, : steps * spec.shift].reshape(batch, steps, spec.shift)
    symbols = (symbols << bit).sum(-1).to(torch.int32)
    states = torch.zeros_like(symbols)
    count = -(-spec.L // spec.shift)
    for ahead in range(count):
        states = (states << spec.shift) | symbols.roll(-ahead, dims=1)
    return states >> (count * spec.shift - spec.L)


def _windows(words: Tensor, spec: TrellisSpec, steps: int) -> Tensor:
    """``unpack`` of whole words: a state is L <= 16 bits of two neighbouring ones."""
    pairs = (words.to(torch.int32) << _WORD) | (words.roll(-1, dims=1).to(torch.int32) & 0xFFFF)
    first = spec.shift * torch.arange(steps, dtype=torch.int32, device=words.device)
    right = 2 * _WORD - spec.L - first % _WORD
    return (pairs.index_select(1, first // _WORD) >> right) & (spec.num_states - 1)
