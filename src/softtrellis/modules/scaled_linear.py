"""A quantized layer while the scales of its channels are tuned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import quantized_layers, replace_modules


class ScaledLinear(nn.Module):
    """y = out_scale * (W (in_scale * x)) + bias, with the decoded W frozen (QTIP, section 4).

    Attributes:
        base: float32 [out, in], the decoded weight without scales.
        in_scale: float32 parameter [in].
        out_scale: float32 parameter [out].
        bias: parameter [out] or None.
    """

    base: Tensor
    in_scale: nn.Parameter
    out_scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, module: QuantizedLinear) -> None:
        super().__init__()
        self._quantized = [module]  # in a list, so that it is no submodule
        self.register_buffer("base", module.unscaled_weight(), persistent=False)
        for name, size in (("in_scale", module.in_features), ("out_scale", module.out_features)):
            scale = getattr(module, name)
            start = torch.ones(size, device=self.base.device) if scale is None else scale.float()
            self.register_parameter(name, nn.Parameter(start))
        bias = None if module.bias is None else nn.Parameter(module.bias.detach().clone())
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y = functional.linear(x * self.in_scale.to(x.dtype), self.base.to(x.dtype))
        y = y * self.out_scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def finish(self) -> QuantizedLinear:
        """The quantized layer with these scales, in float16, and this bias."""
        module = self._quantized[0].to(self.base.device)
        module.set_scales(self.in_scale, self.out_scale)
        if self.bias is not None:
            module.bias = self.bias.detach().clone()
        return module


def scale_(module: nn.Module) -> None:
    """Puts a ``ScaledLinear`` in the place of every quantized layer."""
    layers = quantized_layers(module)
    replace_modules(module, layers, lambda name, _: ScaledLinear(layers[name]))


def unscale_(module: nn.Module) -> None:
    """Undoes ``scale_`` and keeps the scales."""
    scaled = {n: m for n, m in module.named_modules() if isinstance(m, ScaledLinear)}
    replace_modules(module, scaled, lambda name, _: scaled[name].finish())
