"""Packing of tail-biting paths."""

from __future__ import annotations

import pytest
import torch

from softtrellis.spec import TrellisSpec
from softtrellis.trellis.packing import pack, unpack, words_per_tile

SPECS = [
    TrellisSpec(L, k, V)
    for L in (4, 7, 10, 12, 16)
    for k in (1, 2, 3, 4)
    for V in (1, 2)
    if k * V < L
]


def random_tail_biting_paths(spec: TrellisSpec, steps: int, batch: int) -> torch.Tensor:
    """int32 [B, N], from random symbols."""
    generator = torch.Generator().manual_seed(steps)
    symbols = torch.randint(spec.num_branches, (batch, steps), generator=generator)
    states = torch.zeros_like(symbols)
    count = -(-spec.L // spec.shift)
    for offset in range(count):
        states = (states << spec.shift) | symbols.roll(-offset, dims=1)
    return (states >> (count * spec.shift - spec.L)).to(torch.int32)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"L{s.L}k{s.k}V{s.V}")
@pytest.mark.parametrize("weights", [256, 38])
def test_round_trip_at_exactly_k_bits_a_weight(spec: TrellisSpec, weights: int) -> None:
    steps = spec.steps(weights)
    states = random_tail_biting_paths(spec, steps, 5)
    words = pack(states, spec)
    assert words.dtype == torch.int16
    assert words.shape == (5, -(-spec.k * weights // 16))
    assert torch.equal(unpack(words, spec, steps=steps), states)


def test_bit_order_is_the_documented_one() -> None:
    spec = TrellisSpec(L=6, k=2, V=1)
    stream = "1001110100001110" + "11000101"
    cyclic = stream + stream
    states = torch.tensor([[int(cyclic[2 * t : 2 * t + 6], 2) for t in range(12)]])
    words = pack(states, spec)[0].to(torch.int32) & 0xFFFF
    assert [f"{int(word):016b}" for word in words] == [stream[:16], stream[16:] + "00000000"]


def test_short_cycles_wrap_around() -> None:
    spec = TrellisSpec(L=8, k=2, V=1)
    states = torch.full((1, 3), 0b01101101 & 255, dtype=torch.int32)
    states = torch.tensor([[0b01101101, 0b10110110, 0b11011011]], dtype=torch.int32)
    assert torch.equal(unpack(pack(states, spec), spec, steps=3), states)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (torch.tensor([[0, 3, 63]]), "not a path"),
        (torch.tensor([[0, 1, 6]]), "not tail-biting"),
        (torch.tensor([[64, 1]]), "must lie in"),
        (torch.tensor([[0.0, 1.0]]), "must be integers"),
    ],
)
def test_states_that_cannot_be_packed(states: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(states, TrellisSpec(L=6, k=2, V=1))


def test_words_that_do_not_fit() -> None:
    spec = TrellisSpec(L=6, k=2, V=1)
    assert words_per_tile(spec, 256) == 32
    with pytest.raises(ValueError, match="int16"):
        unpack(torch.zeros(1, 32), spec, steps=256)
    with pytest.raises(ValueError, match="words per tile"):
        unpack(torch.zeros(1, 31, dtype=torch.int16), spec, steps=256)
