"""The basis in which a weight matrix is quantized: rotated, and scaled to the codebook's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softtrellis.transforms.incoherence import Incoherence, unrotate_weights


@dataclass(frozen=True, eq=False)
class WeightBasis:
    """W = diag(out_scale) R^-1(scale * latent) diag(in_scale), with R the rotation.

    Attributes:
        incoherence: the randomised Hadamard rotation of both sides, with its padding.
        scale: float32 [], from the codebook's units to the weights'.
        out_scale: float16 [out] or None, for ones.
        in_scale: float16 [in] or None, for ones.
    """

    incoherence: Incoherence
    scale: Tensor
    out_scale: Tensor | None = None
    in_scale: Tensor | None = None

    @classmethod
    def fit(
        cls,
        weight: Tensor,
        incoherence: Incoherence,
        *,
        sigma: float,
        channel_scales: bool,
    ) -> WeightBasis:
        """The basis in which ``weight`` [out, in] has a root mean square.

        Args:
            weight: float32 [out, in].
            incoherence: the rotation.
            sigma: that root mean square, in the codebook's units, see ``TrellisCode.sigma``.
            channel_scales: give every output channel its own float16 scale, with the matrix's
                scale folded in (EXL3); otherwise one float32 number scales the matrix.

        Raises:
            ValueError: a matrix of zeros.
        """
        rms = float(weight.double().square().mean().sqrt())
        if rms == 0.0:
            raise ValueError("the weight is zero everywhere; skip this layer")
        one = torch.ones((), dtype=torch.float32, device=weight.device)
        if not channel_scales:
            rotated = incoherence.rotate_weight(weight)
            return cls(incoherence, _rms(rotated) / sigma)
        channel = weight.square().mean(1).sqrt().clamp_min(1e-3 * rms)
        flat = cls(incoherence, one, out_scale=channel.to(torch.float16))
        factor = _rms(flat.to_latent(weight)) / sigma
        return cls(incoherence, one, out_scale=(channel * factor).to(torch.float16))

    def to_latent(self, weight: Tensor) -> Tensor:
        """[out_pad, in_pad] in the codebook's units from weights [out, in]."""
        if self.out_scale is not None:
            weight = weight / self.out_scale.to(weight.dtype).unsqueeze(1)
        if self.in_scale is not None:
            weight = weight / self.in_scale.to(weight.dtype)
        return self.incoherence.rotate_weight(weight) / self.scale

    def to_weight(self, latent: Tensor) -> Tensor:
        """Weights [out, in] from a latent matrix [out_pad, in_pad]; differentiable."""
        return _scaled(self.unscaled_weight(latent), self.out_scale, self.in_scale)

    def unscaled_weight(self, latent: Tensor) -> Tensor:
        """``to_weight`` without the scales of the channels; differentiable."""
        return self.incoherence.unrotate_weight(latent * self.scale)

    def rotate_hessian(self, hessian: Tensor) -> Tensor:
        """[in_pad, in_pad]: the inputs' second moment in this basis, from H [in, in]."""
        if self.in_scale is not None:
            scale = self.in_scale.to(hessian.dtype)
            hessian = scale.unsqueeze(1) * hessian * scale
        return self.incoherence.rotate_hessian(hessian)

    def rotate_output_hessian(self, hessian: Tensor) -> Tensor:
        """[out_pad, out_pad]: the outputs' Hessian in this basis, from G [out, out]."""
        if self.out_scale is not None:
            scale = self.out_scale.to(hessian.dtype)
            hessian = scale.unsqueeze(1) * hessian * scale
        return self.incoherence.rotate_output_hessian(hessian)


def to_weights(bases: Sequence[WeightBasis], latents: Tensor) -> Tensor:
    """``to_weight`` of a stack, every matrix in its own basis; differentiable.

    Args:
        bases: n, of rotations that differ in their signs only; either all have ``out_scale`` or
            none, and likewise with ``in_scale``. One or more.
        latents: [n, out_pad, in_pad], in the codebook's units.

    Returns:
        [n, out, in].

    Raises:
        ValueError: other bases than that, or another shape.
    """
    scale = torch.stack([basis.scale for basis in bases])
    weights = unrotate_weights(
        [basis.incoherence for basis in bases], latents * scale[:, None, None]
    )
    out_scales = _stack([basis.out_scale for basis in bases])
    return _scaled(weights, out_scales, _stack([basis.in_scale for basis in bases]))


def _stack(scales: Sequence[Tensor | None]) -> Tensor | None:
    """[n, channels] of n scales [channels]; None for none.

    Raises:
        ValueError: some, but not all.
    """
    found = [scale for scale in scales if scale is not None]
    if found and len(found) < len(scales):
        raise ValueError("of one stack either all matrices have scales of their channels or none")
    return torch.stack(found) if found else None


def _scaled(weight: Tensor, out_scale: Tensor | None, in_scale: Tensor | None) -> Tensor:
    """diag(out_scale) W diag(in_scale) of W [..., out, in], scales [..., out] and [..., in]."""
    if out_scale is not None:
        weight = weight * out_scale.to(weight.dtype).unsqueeze(-1)
    if in_scale is not None:
        weight = weight * in_scale.to(weight.dtype).unsqueeze(-2)
    return weight


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt().to(torch.float32)
