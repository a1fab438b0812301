"""The inference layer: packed codes and scales, nothing else."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import Self
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from softtrellis.modules.decode import (
    DecodeBackend,
    ResolvedDecodeBackend,
    check_width,
    code_factor,
    decode_table,
    quantized_linear,
    resolve_decode_backend,
)
from softtrellis.modules.decoded_linear import decoded_linear
from softtrellis.quantizers.basis import WeightBasis
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.transforms.incoherence import Incoherence, pack_signs, padded_size, unpack_signs
from softtrellis.trellis.packing import pack, unpack, words_per_tile


@dataclass(frozen=True)
class LayerFormat:
    """The shape of a quantized linear layer as it is stored.

    Attributes:
        in_features, out_features: of the layer.
        code: how matrices are written as states.
        multiple: both dimensions are padded to a multiple of it.
        block: the order of the Hadamard blocks, or None for full width.
        channel_scales: whether every output channel has its own float16 scale.
        in_scales: whether every input channel has one.
        bias: whether the layer has a bias.
    """

    in_features: int
    out_features: int
    code: TrellisCode
    multiple: int = 16
    block: int | None = None
    channel_scales: bool = False
    in_scales: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "multiple", "block"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and (name, value) != ("block", None):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("channel_scales", "in_scales", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")

    @property
    def padded(self) -> tuple[int, int]:
        """(out, in) after padding."""
        return (
            padded_size(self.out_features, self.multiple),
            padded_size(self.in_features, self.multiple),
        )

    @property
    def tiles(self) -> int:
        """Number of 16x16 tiles."""
        rows, columns = self.padded
        return rows * columns // 256

    def random_incoherence(self, seed: int) -> Incoherence:
        """A rotation of this shape."""
        return Incoherence.random(
            self.in_features,
            self.out_features,
            seed=seed,
            multiple=self.multiple,
            block=self.block,
        )


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored as tail-biting trellis paths.

    The buffers are all that a checkpoint stores of the layer. ``forward`` decodes the weight each
    time and keeps it for nothing, not even for the backward pass ("torch"), or leaves it packed and
    rotates the activations instead ("triton" and "cuda", ``decode.quantized_linear``); between
    ``hold`` and ``release`` it uses the weight that ``hold`` decoded. ``to`` changes the dtype of
    the bias and of a held weight only: codes, scales and codebook keep theirs.

    Attributes:
        layer: the layer's format.
        backend: who computes ``forward``, see ``resolve_decode_backend``; "auto" takes a kernel for
            float16 and bfloat16 activations on a CUDA device that need no gradient.

    Buffers:
        codes: int16 [tiles, words], see ``pack``.
        scale: float32 [].
        in_signs, out_signs: uint8, packed signs of the rotation.
        out_scale: float16 [out_features], with channel scales only.
        in_scale: float16 [in_features], with input scales only.
        bias: [out_features], where the layer has one.
        codebook: float32 [S, V]; shared between layers and not stored with each.
        table: int32, the codebook as the kernels read it, see ``CodeValues``; not stored.
        held_weight: [out_features, in_features] between ``hold`` and ``release``; not stored.
    """

    codes: Tensor
    scale: Tensor
    in_signs: Tensor
    out_signs: Tensor
    out_scale: Tensor | None
    in_scale: Tensor | None
    bias: Tensor | None
    codebook: Tensor
    table: Tensor
    held_weight: Tensor | None

    def __init__(
        self, layer: LayerFormat, codebook: Tensor, backend: DecodeBackend = "auto"
    ) -> None:
        super().__init__()
        self.layer = layer
        self.backend: DecodeBackend = backend
        self._factor = code_factor(layer.code)
        spec, (rows, columns) = layer.code.spec, layer.padded
        words = words_per_tile(spec, spec.steps())
        self.register_buffer("codes", torch.zeros(layer.tiles, words, dtype=torch.int16))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("in_signs", torch.zeros(-(-columns // 8), dtype=torch.uint8))
        self.register_buffer("out_signs", torch.zeros(-(-rows // 8), dtype=torch.uint8))
        channels = torch.ones(layer.out_features, dtype=torch.float16)
        self.register_buffer("out_scale", channels if layer.channel_scales else None)
        inputs = torch.ones(layer.in_features, dtype=torch.float16)
        self.register_buffer("in_scale", inputs if layer.in_scales else None)
        self.register_buffer("bias", torch.zeros(layer.out_features) if layer.bias else None)
        self.register_buffer("codebook", codebook, persistent=False)
        self.register_buffer("table", decode_table(layer.code, codebook), persistent=False)
        self.register_buffer("held_weight", None, persistent=False)

    @classmethod
    def from_states(
        cls,
        layer: LayerFormat,
        codebook: Tensor,
        states: Tensor,
        basis: WeightBasis,
        bias: Tensor | None,
    ) -> QuantizedLinear:
        """Packs tail-biting states int [tiles, N] found in ``basis``."""
        module = cls(layer, codebook).to(states.device)
        module.codes = pack(states, layer.code.spec)
        module.scale = basis.scale.detach().clone()
        module.in_signs = pack_signs(basis.incoherence.in_signs)
        module.out_signs = pack_signs(basis.incoherence.out_signs)
        if basis.out_scale is not None:
            module.out_scale = basis.out_scale.detach().clone()
        if basis.in_scale is not None:
            module.in_scale = basis.in_scale.detach().clone()
        if bias is not None:
            module.bias = bias.detach().clone()
        return module

    @property
    def in_features(self) -> int:
        """Input channels."""
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        """Output channels."""
        return self.layer.out_features

    def basis(self) -> WeightBasis:
        """The basis the codes are written in."""
        rows, columns = self.layer.padded
        incoherence = Incoherence(
            self.layer.in_features,
            self.layer.out_features,
            self.layer.multiple,
            self.layer.block,
            in_signs=unpack_signs(self.in_signs, columns),
            out_signs=unpack_signs(self.out_signs, rows),
        )
        return WeightBasis(incoherence, self.scale, self.out_scale, self.in_scale)

    def states(self) -> Tensor:
        """int32 [tiles, N], the unpacked paths."""
        spec = self.layer.code.spec
        return unpack(self.codes, spec, steps=spec.steps())

    def weight(self) -> Tensor:
        """float32 [out_features, in_features], decoded."""
        return self.basis().to_weight(self._latent())

    def unscaled_weight(self) -> Tensor:
        """``weight`` without the scales of the channels."""
        return self.basis().unscaled_weight(self._latent())

    def set_scales(self, in_scale: Tensor, out_scale: Tensor) -> None:
        """Gives every input and output channel a scale: [in_features] and [out_features]."""
        self.layer = replace(self.layer, in_scales=True, channel_scales=True)
        self.in_scale = in_scale.detach().to(torch.float16)
        self.out_scale = out_scale.detach().to(torch.float16)

    def set_codebook(self, codebook: Tensor) -> None:
        """Gives the layer other values, float32 [S, V], such as those of a table after training."""
        self.codebook = codebook
        self.table = decode_table(self.layer.code, codebook)

    def _latent(self) -> Tensor:
        return self.layer.code.decode(self.states(), self.codebook, *self.layer.padded)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of ``x``.

        See ``resolve_decode_backend`` for errors; ValueError, too, for other ``in_features``.
        """
        layer = self.layer
        check_width(x, layer.in_features)
        if self.held_weight is not None:
            return functional.linear(x, self.held_weight.to(x.dtype), self.bias)
        backend = self._backend_for(x)
        if backend == "torch":
            return decoded_linear(x, self.weight, self.bias)
        return quantized_linear(
            x,
            self.codes,
            self.table,
            layer.code,
            factor=self._factor,
            scale=self.scale,
            in_signs=self.in_signs,
            out_signs=self.out_signs,
            in_scale=self.in_scale,
            out_scale=self.out_scale,
            bias=self.bias,
            out_features=layer.out_features,
            multiple=layer.multiple,
            block=layer.block,
            backend=backend,
        )

    def _backend_for(self, x: Tensor) -> ResolvedDecodeBackend:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if needs_gradient and self.backend == "auto":
            return "torch"
        backend = resolve_decode_backend(self.backend, x)
        if needs_gradient and backend != "torch":
            raise ValueError(
                f"backend {backend!r} has no gradient for the activations; "
                "run it under torch.no_grad(), or use backend='torch'"
            )
        return backend

    def hold(self, dtype: torch.dtype = torch.float32) -> None:
        """Decodes the weight once, for all forward passes until ``release``.

        Call it again after changing codes or scales. ``state_dict`` leaves the weight out.
        """
        self.held_weight = self.weight().to(dtype)

    def release(self) -> None:
        """Drops the weight that ``hold`` decoded."""
        self.held_weight = None

    @property
    def qweight(self) -> Tensor:
        """``codes``, under the name at which peft looks for a quantized layer's device."""
        return self.codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: getattr(self, name) for name in _EXACT}
        shared = {name: getattr(self, name) for name in ("codebook", "table")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if buffer is not None and moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        for name, buffer in shared.items():
            setattr(self, name, _moved_once(buffer, getattr(self, name)))
        return self

    def dequantize(self) -> nn.Linear:
        """A plain linear layer with the decoded weight."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.weight(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear

    def stored_bits(self) -> dict[str, int]:
        """Bits of the stored buffers: "codes", and "scales" (scales and signs)."""
        scales = [self.scale, self.in_signs, self.out_signs, self.out_scale, self.in_scale]
        return {
            "codes": _bits(self.codes),
            "scales": sum(_bits(buffer) for buffer in scales if buffer is not None),
        }

    def extra_repr(self) -> str:
        """Shape and code, for ``print(model)``."""
        code = self.layer.code
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, code={code.name}, L={code.spec.L}, k={code.spec.k}, "
            f"V={code.spec.V}"
        )


_EXACT = ("scale", "out_scale", "in_scale", "codebook")
"""Buffers that a change of dtype would make other weights of."""


_elsewhere: MutableMapping[Tensor, dict[torch.device, ref[Tensor]]] = WeakIdKeyDictionary()


def _moved_once(before: Tensor, after: Tensor) -> Tensor:
    """``after``, or what another layer made of ``before`` on that device, while it is in use.

    So layers that share a codebook still do where a model is moved, or a part of it and back.
    """
    if after.device == before.device:
        return after
    known = _elsewhere.setdefault(before, {}).get(after.device, lambda: None)()
    if known is not None:
        return known
    _elsewhere[before][after.device] = ref(after)
    _elsewhere[after] = {before.device: ref(before)}
    return after


def _bits(buffer: Tensor) -> int:
    return buffer.numel() * buffer.element_size() * 8


def meta_layer(layer: LayerFormat) -> QuantizedLinear:
    """A layer of this format on the device "meta": shapes without memory."""
    spec = layer.code.spec
    with torch.device("meta"):
        return QuantizedLinear(layer, torch.empty(spec.num_states, spec.V, dtype=torch.float32))
