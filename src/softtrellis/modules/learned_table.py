"""The table of HYB as a parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softtrellis.codes.hybrid import table_of
from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.quantizers.hard import TrellisCode


class LearnedTable:
    """The codewords of "hyb", trained with the layers that share them.

    Attributes:
        table: float32 parameter [512, 2].
    """

    def __init__(self, code: TrellisCode, layers: list[LatentLinear]) -> None:
        """Starts at the layers' codebook, which they have in common."""
        self._layers = layers
        self._code = TrellisCode(code.spec, code.name, code.flip, normalize=False)
        self.table = nn.Parameter(table_of(layers[0].codebook, code.spec, code.flip))
        self._graph: Tensor | None = None

    def hold(self) -> None:
        """Gives the layers the codebook of the table; before their own ``hold``.

        Where gradients are enabled it collects theirs, until ``release``.
        """
        self._graph = self._code.codebook(self.table)
        codebook = self._graph.detach().requires_grad_(torch.is_grad_enabled())
        for layer in self._layers:
            layer.codebook = codebook

    def release(self) -> None:
        """Carries the codebook's gradient to the table; after the layers' own ``release``."""
        gradient = self._layers[0].codebook.grad
        if self._graph is not None and gradient is not None:
            self._graph.backward(gradient)
        self._graph = None
