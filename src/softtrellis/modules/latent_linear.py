"""The training layer: latent weights, and codewords computed from them on every pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from softtrellis.backend import Backend
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.quantizers.basis import WeightBasis
from softtrellis.quantizers.soft import Estimator, check_estimator, estimate
from softtrellis.quantizers.tiling import from_tiles, to_tiles
from softtrellis.trellis.bitshift import overlap_in


class LatentLinear(nn.Module):
    """A linear layer trained through its trellis (BCJR-QAT, arXiv 2605.10655, section 3).

    The latent weights live in the rotated basis, in the codebook's units. Both ends of every path
    stay pinned to the overlap of a hard tail-biting code, so that T to 0 gives a code that packs.

    Attributes:
        latent: float32 parameter [out_pad, in_pad].
        pins: int32 buffer [tiles], the overlap at both ends.
        temperature: T over the codebook's variance; set it before every pass. A tensor [] on the
            layer's device where a CUDA graph or ``torch.compile`` is to follow its changes: every
            new number would be compiled anew.
        estimator: "soft", "straight_through" or "identity", see ``estimate``.
        backend: as in ``bcjr``.
    """

    pins: Tensor
    start: Tensor
    bias: Tensor | None

    def __init__(
        self,
        layer: LayerFormat,
        codebook: Tensor,
        basis: WeightBasis,
        states: Tensor,
        bias: Tensor | None,
        *,
        estimator: Estimator = "soft",
        temperature: float | Tensor = 0.1,
        backend: Backend = "auto",
    ) -> None:
        """Starts at the codewords of tail-biting states int [tiles, N].

        Raises:
            ValueError: an unknown estimator.
        """
        super().__init__()
        check_estimator(estimator)
        self.layer, self.codebook, self.basis = layer, codebook, basis
        self.estimator: Estimator = estimator
        self.temperature, self.backend = temperature, backend
        self.codebook_variance = float(codebook.double().square().mean())
        self.register_buffer("start", states.to(torch.int32))
        self.register_buffer("pins", overlap_in(self.start[:, 0], layer.code.spec))
        self.latent = nn.Parameter(layer.code.decode(states, codebook, *layer.padded))
        self.register_buffer("bias", bias)

    @classmethod
    def from_quantized(
        cls,
        module: QuantizedLinear,
        *,
        estimator: Estimator = "soft",
        temperature: float | Tensor = 0.1,
        backend: Backend = "auto",
    ) -> LatentLinear:
        """The training layer that starts from a quantized layer's codes."""
        return cls(
            module.layer,
            module.codebook,
            module.basis(),
            module.states(),
            module.bias,
            estimator=estimator,
            temperature=temperature,
            backend=backend,
        )

    def tiles(self) -> Tensor:
        """[tiles, N, V], the latent weights along the trellis; differentiable."""
        return to_tiles(self.latent, self.layer.code.spec, self.layer.code.order)

    def weight(self) -> Tensor:
        """[out_features, in_features] at the current temperature, differentiable."""
        code = self.layer.code
        values = estimate(
            self.tiles(),
            self.codebook,
            code.spec,
            estimator=self.estimator,
            temperature=self.temperature * self.codebook_variance,
            pins=self.pins,
            backend=self.backend,
        )
        return self.basis.to_weight(from_tiles(values, *self.layer.padded, code.order))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return functional.linear(x, self.weight().to(x.dtype), self.bias)

    @torch.no_grad()
    def hard_states(self) -> Tensor:
        """int32 [tiles, N]: the code that T to 0 leads to with the current pins."""
        code = self.layer.code
        return code.encode(self.latent, self.codebook, ends=self.pins, backend=self.backend)

    @torch.no_grad()
    def reencode(self) -> None:
        """Moves the pins to where tail-biting Viterbi now closes the paths."""
        code = self.layer.code
        states = code.encode(self.latent, self.codebook, backend=self.backend)
        self.pins = overlap_in(states[:, 0], code.spec)

    def harden(self) -> QuantizedLinear:
        """The inference layer of the hard code; its weight is what is saved, bit for bit."""
        return QuantizedLinear.from_states(
            self.layer, self.codebook, self.hard_states(), self.basis, self.bias
        )

    def extra_repr(self) -> str:
        """Shape and estimator, for ``print(model)``."""
        return (
            f"in_features={self.layer.in_features}, out_features={self.layer.out_features}, "
            f"estimator={self.estimator}"
        )
