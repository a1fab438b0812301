"""EXL3, the format of exllamav3: one linear layer as its tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softtrellis.io.foreign import check_tensor, signs_of
from softtrellis.io.manifest import CheckpointError
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.quantizers.basis import WeightBasis
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.quantizers.tiling import from_tiles
from softtrellis.spec import TILE_SIDE, TILE_WEIGHTS, TrellisSpec
from softtrellis.transforms.incoherence import Incoherence, pack_signs, padded_size

FORMAT = "exl3"
BLOCK = 128
STATE_BITS = 16
MAX_BITS, MAX_CODE_BITS = 8, 4
"""Bits per weight that EXL3 has, and that a code here has."""

MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
"""Codes that a tensor of their name marks; no such tensor means 3INST."""

CODES = (*MULTIPLIERS, "3inst")
TENSORS = ("trellis", "suh", "svh", "bias", *MULTIPLIERS)
"""The names that a layer's tensors can have."""


def exl3_code(name: str, bits: int) -> TrellisCode:
    """The code of that name as EXL3 has it: used as it is, in EXL3's order of a tile's elements."""
    return TrellisCode(TrellisSpec(STATE_BITS, bits, 1), name, normalize=False, order="exl3")


def exl3_layer_format(
    in_features: int, out_features: int, code: TrellisCode, *, bias: bool, in_scales: bool = True
) -> LayerFormat:
    """The shape of a layer of EXL3."""
    return LayerFormat(
        in_features, out_features, code, BLOCK, BLOCK, True, in_scales=in_scales, bias=bias
    )


def exl3_obstacle(layer: LayerFormat) -> str | None:
    """Why EXL3 cannot hold a layer, or None if it can."""
    if (reason := _other_profile(layer)) is not None:
        return f"{reason}; quantize the model again with 'softtrellis quantize --profile exl3'"
    if layer.bias and layer.padded[0] != layer.out_features:
        return (
            f"it has a bias and {layer.out_features} output channels, no multiple of 128, and how "
            "EXL3 pads a bias is not known"
        )
    return None


def _other_profile(layer: LayerFormat) -> str | None:
    code = layer.code
    if code.name not in CODES:
        return f"its code is {code.name}, and EXL3 has {', '.join(CODES)}"
    plain = replace(code, seed=0, flip="second")  # which these codes do not use
    if plain != exl3_code(code.name, code.spec.k):
        return (
            f"its code has L={code.spec.L}, V={code.spec.V}, tile order {code.order!r} and "
            f"normalize={code.normalize}, and EXL3 has L=16, V=1, 'exl3' and False"
        )
    if (layer.multiple, layer.block) != (BLOCK, BLOCK):
        width = "full width" if layer.block is None else f"blocks of {layer.block}"
        return f"it is rotated in {width} and padded to multiples of {layer.multiple}, not of 128"
    return None


def exl3_tensors(module: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors that EXL3 stores of a layer, under their names there, on the CPU.

    W [in, out] = diag(suh) H What H diag(svh), H in blocks of 128. Channels that pad the layer
    have scales of zero, and their random signs are those of the zeros.

    Returns:
        "trellis" int16 [in / 16, out / 16, 16 k], "suh" float16 [in], "svh" float16 [out], with
        both dimensions padded; "bias" float16 [out] where the layer has one; and an int32 scalar
        named "mcg" or "mul1" if that is the code.

    Raises:
        ValueError: a layer that EXL3 cannot hold, or scales or a bias outside float16's range.
    """
    layer = module.layer
    obstacle = exl3_obstacle(layer)
    if obstacle is not None:
        raise ValueError(obstacle)
    basis = module.basis()
    tensors = {
        "trellis": trellis_of_codes(module.codes.cpu(), layer),
        "suh": _signed_scale(basis.incoherence.in_signs, basis.in_scale, None, layer.in_features),
        "svh": _signed_scale(
            basis.incoherence.out_signs, basis.out_scale, basis.scale, layer.out_features
        ),
    }
    if module.bias is not None:
        tensors["bias"] = to_half(module.bias)
    if layer.code.name in MULTIPLIERS:
        tensors[layer.code.name] = _int32(MULTIPLIERS[layer.code.name])
    return tensors


def trellis_of_codes(codes: Tensor, layer: LayerFormat) -> Tensor:
    """int16 [in / 16, out / 16, 16 k] of ``QuantizedLinear.codes`` [tiles, 16 k].

    The same cyclic stream, with its beginning elsewhere: here state t is the 16 bits that start
    at bit t k, in EXL3 those that end there, one symbol later. Words of 32 bits are little-endian.
    """
    k = layer.code.spec.k
    words = codes.to(torch.int32) & 0xFFFF
    rotated = (words << (STATE_BITS - k)) | (words.roll(-1, 1) >> k)
    rows, columns = layer.padded
    tiles = _swap_pairs(_int16(rotated)).view(rows // TILE_SIDE, columns // TILE_SIDE, -1)
    return tiles.transpose(0, 1).contiguous()


def codes_of_trellis(trellis: Tensor) -> Tensor:
    """The inverse of ``trellis_of_codes``: int16 [tiles, 16 k]."""
    k = trellis.shape[-1] // TILE_SIDE
    words = _stream_words(trellis)
    rotated = (words.roll(1, 1) << k) | (words >> (STATE_BITS - k))
    return _int16(rotated)


@dataclass(frozen=True)
class Exl3Layer:
    """The tensors of a layer of EXL3, found to fit together.

    Attributes:
        in_features, out_features: of the layer, before padding.
        bits: K, 1 to 8.
        code: "mul1", "mcg" or "3inst".
        trellis: int16 [in_pad / 16, out_pad / 16, 16 K].
        suh, svh: float16 [in_pad] and [out_pad].
        bias: float16 [out_features] or None.
    """

    in_features: int
    out_features: int
    bits: int
    code: str
    trellis: Tensor
    suh: Tensor
    svh: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls, name: str, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> Exl3Layer:
        """Checks the tensors of the layer ``name`` against each other and the model.

        Raises:
            CheckpointError: a tensor is missing, of a wrong shape or type, or not finite.
        """
        for key in ("trellis", "suh", "svh"):
            if key not in tensors:
                raise CheckpointError(f"the EXL3 layer {name} lacks its {key}")
        unknown = sorted(tensors.keys() - set(TENSORS))
        if unknown:
            raise CheckpointError(f"the EXL3 layer {name} has an unknown tensor {unknown[0]}")
        trellis = tensors["trellis"]
        bits, rest = divmod(trellis.shape[-1] if trellis.ndim else 0, TILE_SIDE)
        if rest or not 1 <= bits <= MAX_BITS:
            raise CheckpointError(
                f"{name}.trellis has shape {list(trellis.shape)}; its last dimension must be 16 "
                f"times 1 to {MAX_BITS} bits"
            )
        inputs, outputs = padded_size(in_features, BLOCK), padded_size(out_features, BLOCK)
        tiles = (inputs // TILE_SIDE, outputs // TILE_SIDE, trellis.shape[-1])
        check_tensor(name, "trellis", trellis, torch.int16, tiles)
        check_tensor(name, "suh", tensors["suh"], torch.float16, (inputs,))
        check_tensor(name, "svh", tensors["svh"], torch.float16, (outputs,))
        if "bias" in tensors:
            check_tensor(name, "bias", tensors["bias"], torch.float16, (out_features,))
        marks = [code for code in MULTIPLIERS if code in tensors]
        if len(marks) > 1:
            raise CheckpointError(f"the EXL3 layer {name} has marks of two codes: mcg and mul1")
        for code in marks:
            mark = tensors[code]
            scalar = mark.dtype == torch.int32 and mark.numel() == 1
            if not scalar or int(mark) & 0xFFFFFFFF != MULTIPLIERS[code]:
                raise CheckpointError(
                    f"{name}.{code} is not the multiplier {MULTIPLIERS[code]:#x}; no other is known"
                )
        return cls(
            in_features,
            out_features,
            bits,
            marks[0] if marks else "3inst",
            trellis,
            tensors["suh"],
            tensors["svh"],
            tensors.get("bias"),
        )

    @property
    def layer(self) -> LayerFormat:
        """The shape of the same layer here; ValueError for more than 4 bits."""
        code = exl3_code(self.code, self.bits)
        scaled = bool((self.suh[: self.in_features].abs() != 1).any())
        has_bias = self.bias is not None
        return exl3_layer_format(
            self.in_features, self.out_features, code, bias=has_bias, in_scales=scaled
        )

    def basis(self) -> WeightBasis:
        """The basis that the trellis is written in."""
        incoherence = Incoherence(
            self.in_features,
            self.out_features,
            BLOCK,
            BLOCK,
            in_signs=signs_of(self.suh),
            out_signs=signs_of(self.svh),
        )
        return WeightBasis(
            incoherence,
            torch.ones((), dtype=torch.float32),
            out_scale=self.svh[: self.out_features].abs(),
            in_scale=self.suh[: self.in_features].abs(),
        )

    def to_module(self, codebook: Tensor) -> QuantizedLinear:
        """The layer with the same bits; ``codebook`` is that of ``self.layer.code``."""
        layer, basis = self.layer, self.basis()
        module = QuantizedLinear(layer, codebook)
        module.codes = codes_of_trellis(self.trellis)
        module.in_signs = pack_signs(basis.incoherence.in_signs)
        module.out_signs = pack_signs(basis.incoherence.out_signs)
        module.out_scale = basis.out_scale
        if layer.in_scales:
            module.in_scale = basis.in_scale
        if self.bias is not None:
            module.bias = self.bias.to(torch.float32)
        return module

    def weight(self) -> Tensor:
        """float32 [out, in], decoded; for all numbers of bits."""
        codebook = exl3_code(self.code, MAX_CODE_BITS).codebook()
        values = codebook[states_of_trellis(self.trellis)]
        rows, columns = self.svh.numel(), self.suh.numel()
        return self.basis().to_weight(from_tiles(values, rows, columns, "exl3"))


def states_of_trellis(trellis: Tensor) -> Tensor:
    """int64 [tiles, 256], the states of int16 [in / 16, out / 16, 16 K], K from 1 to 16.

    State t is the 16 bits that end at bit (t + 1) K of the cyclic stream.
    """
    K = trellis.shape[-1] // TILE_SIDE
    words = _stream_words(trellis)
    last = K * torch.arange(1, TILE_WEIGHTS + 1) - STATE_BITS  # where a state's bits begin
    word, bit = last // STATE_BITS, last % STATE_BITS  # the first is before the stream's beginning
    count = words.shape[1]
    both = (words[:, word % count].to(torch.int64) << STATE_BITS) | words[:, (word + 1) % count]
    return (both >> (STATE_BITS - bit)) & 0xFFFF


def to_half(tensor: Tensor) -> Tensor:
    """float16 on the CPU; ValueError for values that it cannot hold."""
    half = tensor.detach().cpu().to(torch.float16)
    if not bool(half.isfinite().all()):
        raise ValueError("a value is not finite in float16; EXL3 has no wider type")
    return half


def _stream_words(trellis: Tensor) -> Tensor:
    """int32 [tiles, 16 K] from 0 to 65535, most significant first; tiles by blocks of outputs."""
    tiles = trellis.transpose(0, 1).reshape(-1, trellis.shape[-1])
    return _swap_pairs(tiles).to(torch.int32) & 0xFFFF


def _swap_pairs(words: Tensor) -> Tensor:
    return words.view(*words.shape[:-1], -1, 2).flip(-1).reshape(words.shape)


def _int16(words: Tensor) -> Tensor:
    """The low 16 bits of int32 words."""
    low = words & 0xFFFF
    return torch.where(low >= 1 << 15, low - (1 << 16), low).to(torch.int16)


def _int32(value: int) -> Tensor:
    return torch.tensor(value - (1 << 32), dtype=torch.int32)


def _signed_scale(
    signs: Tensor, scale: Tensor | None, factor: Tensor | None, features: int
) -> Tensor:
    """float16 [padded]: signs * scale * factor; zeros, with their signs, where channels pad."""
    signed = signs.to(torch.float32)
    magnitude = torch.zeros_like(signed)
    magnitude[:features] = 1.0 if scale is None else scale.to(torch.float32)
    return to_half(signed * magnitude if factor is None else signed * magnitude * factor)
