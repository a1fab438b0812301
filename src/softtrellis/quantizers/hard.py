"""Matrices of latent weights to trellis states, and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from softtrellis.backend import Backend
from softtrellis.codes.codebook import check_code, codebook
from softtrellis.codes.hybrid import Flip
from softtrellis.quantizers.tiling import TileOrder, check_order, from_tiles, to_tiles
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.validation import Ends
from softtrellis.trellis.viterbi import best_states

_STRETCH = {1: 0.93, 2: 1.0, 3: 1.1, 4: 1.15}
"""By bits: standard deviations of N(0, 1) that a codebook of RMS 1 is best stretched to.

Medians over the codes at L = 16 (benchmarks/code_scales.py): the more bits, the more the error lies
in the tails that the codebook does not reach.
"""


@dataclass(frozen=True)
class TrellisCode:
    """All that fixes how a matrix is written as states, apart from a table's values.

    Attributes:
        spec: the trellis.
        name: the code, see ``codebook``.
        flip: which component "hyb" flips.
        normalize: whether the codebook has RMS 1; EXL3's codes are used as they are.
        seed: of "gaussian" and of the default table of "hyb".
        order: the order of a tile's elements along the trellis.
    """

    spec: TrellisSpec = field(default_factory=TrellisSpec)
    name: str = "hyb"
    flip: Flip = "second"
    normalize: bool = True
    seed: int = 0
    order: TileOrder = "rows"

    def __post_init__(self) -> None:
        check_code(self.name, self.spec)
        check_order(self.order)

    def codebook(self, table: Tensor | None = None) -> Tensor:
        """float32 [2**L, V]; ``table`` is the table of "hyb", by default the k-means one."""
        return codebook(
            self.name,
            self.spec,
            seed=self.seed,
            table=table,
            flip=self.flip,
            normalize=self.normalize,
        )

    def sigma(self, values: Tensor) -> float:
        """Standard deviation of the normal weights that a codebook [S, V] quantizes best."""
        if self.name == "scalar":
            return 1.0
        return float(values.detach().double().square().mean().sqrt()) / _STRETCH[self.spec.k]

    def encode(
        self,
        latent: Tensor,
        values: Tensor,
        *,
        ends: Ends = "tail_biting",
        backend: Backend = "auto",
        check_values: bool = True,
    ) -> Tensor:
        """int32 [B, N] states of the nearest paths to a latent matrix [out, in].

        Args:
            latent: [out, in] in multiples of 16, in the codebook's units.
            values: [S, V], the codebook.
            ends, backend: as in ``viterbi``.
            check_values: as in ``best_states``.
        """
        tiles = to_tiles(latent, self.spec, self.order)
        return best_states(
            tiles, values, self.spec, ends=ends, backend=backend, check_values=check_values
        )

    def decode(self, states: Tensor, values: Tensor, out_features: int, in_features: int) -> Tensor:
        """[out, in] latent matrix of states int [B, N]; the inverse of ``encode`` on codewords."""
        return from_tiles(values[states.to(torch.int64)], out_features, in_features, self.order)
