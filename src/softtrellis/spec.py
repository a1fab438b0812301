"""The shape of a bitshift trellis."""

from __future__ import annotations

from dataclasses import dataclass

MIN_STATE_BITS, MAX_STATE_BITS = 4, 16
TILE_SIDE = 16
TILE_WEIGHTS = TILE_SIDE * TILE_SIDE


@dataclass(frozen=True)
class TrellisSpec:
    """A bitshift trellis (QTIP, arXiv 2406.11235, section 3.1).

    A state has ``L`` bits. Every step shifts in ``k * V`` new bits and emits ``V`` weights, so
    that ``k`` bits are stored per weight. Two neighbouring states share their *overlap* of
    ``L - k * V`` bits.

    Args:
        L: bits of a state, 4 to 16.
        k: bits stored per weight, 1 to 4.
        V: weights emitted per step, 1 or 2; ``k * V < L``.

    Raises:
        ValueError: a size outside these ranges.
    """

    L: int = 16
    k: int = 2
    V: int = 2

    def __post_init__(self) -> None:
        for name in ("L", "k", "V"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if not MIN_STATE_BITS <= self.L <= MAX_STATE_BITS:
            raise ValueError(f"L must be from {MIN_STATE_BITS} to {MAX_STATE_BITS}, got {self.L}")
        if not 1 <= self.k <= 4:
            raise ValueError(f"k must be from 1 to 4 bits per weight, got {self.k}")
        if self.V not in (1, 2):
            raise ValueError(f"V must be 1 or 2 weights per step, got {self.V}")
        if self.shift >= self.L:
            raise ValueError(
                f"k * V must be smaller than L, got k={self.k}, V={self.V}, L={self.L}; "
                f"use L of at least {self.shift + 1}"
            )

    @property
    def shift(self) -> int:
        """Bits shifted in per step, ``k * V``."""
        return self.k * self.V

    @property
    def num_states(self) -> int:
        """``S = 2**L``."""
        return 1 << self.L

    @property
    def num_overlaps(self) -> int:
        """``U = 2**(L - k V)``: what two neighbouring states share."""
        return 1 << (self.L - self.shift)

    @property
    def num_branches(self) -> int:
        """``R = 2**(k V)``: successors of every state."""
        return 1 << self.shift

    def steps(self, n: int = TILE_WEIGHTS) -> int:
        """Steps ``N = n / V`` that emit ``n`` weights; ValueError if V does not divide n."""
        if n < 1 or n % self.V:
            raise ValueError(f"the number of weights must be a positive multiple of {self.V}: {n}")
        return n // self.V

    @property
    def min_closed_steps(self) -> int:
        """Fewest steps for which a path between any two overlaps exists."""
        return -(-(self.L - self.shift) // self.shift)
