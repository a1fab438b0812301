"""Quantized layers of the same inputs as one: q, k and v of attention, gate and up of an MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softtrellis.modules.decode import check_width, code_factor, resolve_decode_backend
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.rotated_product import rotated_product, unrotated


class JointLinear(nn.Module):
    """Layers whose inputs are rotated alike, as one rotation of the inputs and one product.

    PTQ draws the same signs for the inputs of layers that read the same activations. Inference
    only; ``torch.compile`` does not trace it. The layers' codes become parts of one tensor, so that
    it takes no more memory; move the layers to their device before.

    Attributes:
        layers: the layers. Their backends, which must agree, say who computes.
        codes: int16 [tiles, words], those of all layers, one after the other.
    """

    codes: Tensor

    def __init__(self, layers: Sequence[QuantizedLinear]) -> None:
        """Takes the layers over; one or more.

        Raises:
            ValueError: layers that differ in their inputs' rotation, code or backend.
        """
        super().__init__()
        for layer in layers[1:]:
            _check_alike(layers[0], layer)
        self.layers = nn.ModuleList(layers)
        self.register_buffer("codes", torch.cat([layer.codes for layer in layers]), False)
        tiles = [layer.layer.tiles for layer in layers]
        for layer, part in zip(layers, self.codes.split(tiles), strict=True):
            layer.codes = part

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., in_features] to [..., out_features] of every layer, in the dtype of ``x``.

        See ``resolve_decode_backend`` for errors; ValueError, too, for other ``in_features``.
        """
        layers: list[QuantizedLinear] = list(self.layers)  # type: ignore[arg-type]
        first = layers[0]
        backend = resolve_decode_backend(first.backend, x)
        gradient = torch.is_grad_enabled() and x.requires_grad
        if backend == "torch" or gradient or x.numel() == 0:
            return tuple(layer(x) for layer in layers)
        check_width(x, first.in_features)
        (block, multiple), code = (first.layer.block, first.layer.multiple), first.layer.code
        product = rotated_product(
            x.contiguous(), first.in_signs, first.in_scale, self.codes, first.table, code,
            [layer.layer.padded[0] for layer in layers], backend, multiple=multiple, block=block,
        )  # fmt: skip
        outputs = unrotated(
            product,
            [(y.out_signs, y.scale, y.out_scale, y.bias, y.out_features) for y in layers],
            factor=code_factor(code), dtype=x.dtype, backend=backend, block=block,
        )  # fmt: skip
        return tuple(outputs)


def _check_alike(first: QuantizedLinear, other: QuantizedLinear) -> None:
    """ValueError unless the two layers can be computed together."""
    a, b = first.layer, other.layer
    alike = {
        "in_features": a.in_features == b.in_features,
        "code": a.code == b.code,
        "multiple": a.multiple == b.multiple,
        "block": a.block == b.block,
        "backend": first.backend == other.backend,
        "in_signs": torch.equal(first.in_signs, other.in_signs),
        "in_scale": _equal(first.in_scale, other.in_scale),
        "table": torch.equal(first.table, other.table),
        "device": first.codes.device == other.codes.device,
    }
    different = [name for name, same in alike.items() if not same]
    if different:
        raise ValueError(f"layers of one product must not differ in {', '.join(different)}")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
