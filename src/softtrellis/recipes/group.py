"""Quantizing linear layers that share their inputs: one Hessian, one rotation, one LDLQ."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from softtrellis.backend import Backend
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.modules.tile_share import TileShare
from softtrellis.quantizers.basis import WeightBasis
from softtrellis.quantizers.correction import corrected_weight
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.quantizers.ldlq import (
    BLOCK,
    Feedback,
    Tiles,
    block_ldl,
    ldlq,
    proxy_loss,
    two_sided_ldlq,
)
from softtrellis.recipes.ranks import ONE, Ranks
from softtrellis.spec import TILE_SIDE
from softtrellis.trellis.packing import pack, unpack, words_per_tile


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one layer.

    Attributes:
        proxy_loss: share of the output's energy lost on the calibration text, tr(E H E^T) over
            tr(W H W^T); of corrected weights where weights are corrected first.
        error: mean squared error of the weights over their variance, likewise.
        seconds: time it took, shared evenly by the layers that were quantized together.
        damping: what was added to the Hessian's diagonal, over its mean; 0 without a Hessian.
        dead: input channels that never fired.
        tokens: inputs that the layer saw.
        borrowed: its Hessian is that of all experts beside it, because it saw too few.
        largest: the largest weight over their root mean square.
    """

    proxy_loss: float
    error: float
    seconds: float
    damping: float = 0.0
    dead: int = 0
    tokens: int = 0
    largest: float = 0.0
    borrowed: bool = False


def name_seed(seed: int, name: str) -> int:
    """A seed for a name: the same whatever else is quantized."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def quantize_group(
    linears: Mapping[str, nn.Linear],
    hessian: Tensor | None,
    formats: Mapping[str, LayerFormat],
    codebooks: Mapping[TrellisCode, Tensor],
    *,
    leader: str,
    cross: Tensor | None = None,
    outputs: Mapping[str, Tensor] | None = None,
    tokens: int = 0,
    damping: float = 0.01,
    correction_damping: float = 0.1,
    output_damping: float = 0.1,
    seed: int = 0,
    backend: Backend = "auto",
    ranks: Ranks = ONE,
) -> dict[str, tuple[QuantizedLinear, LayerReport]]:
    """Quantizes the weights of layers that have the same inputs (QTIP, section 4).

    Their inputs are rotated alike, so that one factorisation serves all, and the columns of all
    layers of one code are encoded together.

    Args:
        linears: by name; weights [out, in] on one device.
        hessian: [in, in], E[x x^T]; None is plain Viterbi without error feedback.
        formats: their stored shapes.
        codebooks: float32 [S, V] on that device for every code of theirs.
        leader: the name that the signs of the inputs are drawn for.
        cross: [in, in], E[x x'^T] with x the inputs in the original model and x' those of the
            Hessian; the weights are corrected with it first, see ``corrected_weight``.
        outputs: G [out, out] of every layer, see ``output_hessians``, for ``two_sided_ldlq``; with
            a Hessian, and one rank.
        tokens: inputs that the Hessian was taken from, for the report.
        damping, correction_damping, output_damping, seed, backend: see ``QuantizeConfig``.
        ranks: that call this together with the same arguments, and encode a part of the outputs
            each; all get all of them.

    Raises:
        ValueError: weights with NaN or infinity, or a weight that is zero; with the name.
    """
    began = time.perf_counter()
    weights = {name: _weight(name, linear) for name, linear in linears.items()}
    if hessian is not None and cross is not None:
        try:
            together = torch.cat(list(weights.values()))
            corrected = corrected_weight(together, hessian, cross, correction_damping)
        except ValueError as error:
            raise ValueError(f"{leader}: {error}") from error
        rows = [len(weight) for weight in weights.values()]
        weights = dict(zip(weights, corrected.split(rows), strict=True))
    bases: dict[str, WeightBasis] = {}
    for name, weight in weights.items():
        layer = formats[name]
        signs = layer.random_incoherence(name_seed(seed, f"inputs of {leader}")).in_signs
        own = layer.random_incoherence(name_seed(seed, name))
        try:
            bases[name] = WeightBasis.fit(
                weight,
                replace(own, in_signs=signs).to(weight.device),
                sigma=layer.code.sigma(codebooks[layer.code]),
                channel_scales=layer.channel_scales,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    feedback = None
    if hessian is not None:
        try:
            feedback = block_ldl(next(iter(bases.values())).rotate_hessian(hessian), damping)
        except ValueError as error:
            raise ValueError(f"{leader}: {error}") from error
    made: dict[str, QuantizedLinear] = {}
    for code in dict.fromkeys(layer.code for layer in formats.values()):
        names = [name for name, layer in formats.items() if layer.code == code]
        latents = [bases[name].to_latent(weights[name]) for name in names]
        if outputs is None or feedback is None:
            latent = torch.cat(latents)
            states = _encode_together(latent, feedback, code, codebooks[code], backend, ranks)
            parts = list(states.split([formats[name].tiles for name in names]))
        else:
            try:
                sides = [
                    block_ldl(
                        bases[name].rotate_output_hessian(outputs[name].to(latent.device)),
                        output_damping,
                    )
                    for name, latent in zip(names, latents, strict=True)
                ]
            except ValueError as error:
                raise ValueError(f"outputs of {', '.join(names)}: {error}") from error
            parts = _encode_two_sided(latents, feedback, sides, code, codebooks[code], backend)
        for name, part in zip(names, parts, strict=True):
            made[name] = QuantizedLinear.from_states(
                formats[name], codebooks[code], part, bases[name], linears[name].bias
            )
    seconds = (time.perf_counter() - began) / len(linears)
    results = {}
    for name, weight in weights.items():
        found, energy = made[name].weight(), weight.square().mean()
        h = torch.eye(weight.shape[1], device=weight.device) if hessian is None else hessian
        results[name] = (
            made[name],
            LayerReport(
                proxy_loss=proxy_loss(weight, found, h),
                error=float((found - weight).square().mean() / energy),
                seconds=seconds,
                damping=0.0 if feedback is None else feedback.damping,
                dead=0 if hessian is None else int((hessian.diagonal() <= 0).sum()),
                tokens=tokens,
                largest=float(weight.abs().max() / energy.sqrt()),
            ),
        )
    return results


def _weight(name: str, linear: nn.Linear) -> Tensor:
    weight = linear.weight.detach().to(torch.float32)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}: the weight holds NaN or infinity")
    return weight


def _encode_together(
    latent: Tensor,
    feedback: Feedback | None,
    code: TrellisCode,
    codebook: Tensor,
    backend: Backend,
    ranks: Ranks,
) -> Tensor:
    """``_encode``, of which every rank does some rows: LDLQ feeds errors along them only."""
    if ranks.mesh is None:
        return _encode(latent, feedback, code, codebook, backend)
    rows, columns = (size // TILE_SIDE for size in latent.shape)
    share, spec = TileShare(ranks.mesh, rows), code.spec
    owned = share.owned
    codes = latent.new_empty(0, words_per_tile(spec, spec.steps()), dtype=torch.int16)
    if owned.stop > owned.start:
        own = latent[owned.start * TILE_SIDE : owned.stop * TILE_SIDE]
        codes = pack(_encode(own, feedback, code, codebook, backend), spec)
    codes = codes.reshape(owned.stop - owned.start, columns, codes.shape[1])
    return unpack(share.gather_bytes(codes).flatten(0, 1), spec, steps=spec.steps())


def _encode(
    latent: Tensor,
    feedback: Feedback | None,
    code: TrellisCode,
    codebook: Tensor,
    backend: Backend,
) -> Tensor:
    """int32 [tiles, N]: the states of a latent matrix [out, in], by LDLQ with feedback."""
    if feedback is None:
        return code.encode(latent, codebook, backend=backend)
    blocks: list[Tensor] = []

    def encode(columns: Tensor) -> Tensor:
        states = code.encode(columns, codebook, backend=backend, check_values=False)
        blocks.append(states)
        return code.decode(states, codebook, columns.shape[0], BLOCK)

    if not bool(torch.isfinite(feedback.factor).all()):  # then every target is finite
        raise ValueError("the Hessian's factor holds NaN or infinity; raise the damping")
    ldlq(latent, feedback, encode)
    return torch.stack(blocks[::-1], dim=1).flatten(0, 1)


def _encode_two_sided(
    latents: Sequence[Tensor],
    inputs: Feedback,
    outputs: Sequence[Feedback],
    code: TrellisCode,
    codebook: Tensor,
    backend: Backend,
) -> list[Tensor]:
    """int32 [tiles, N] of every latent matrix [out, in]."""
    device, steps = codebook.device, code.spec.steps()
    found = [
        torch.empty(len(x) // BLOCK, x.shape[1] // BLOCK, steps, dtype=torch.int32, device=device)
        for x in latents
    ]

    def encode(targets: Tensor, tiles: Tiles) -> Tensor:
        states = code.encode(targets, codebook, backend=backend, check_values=False)
        parts = states.split([len(i) for i, _ in tiles])
        for paths, (i, j), part in zip(found, tiles, parts, strict=True):
            paths[i, j] = part
        return code.decode(states, codebook, len(targets), BLOCK)

    if not all(bool(torch.isfinite(f.factor).all()) for f in (inputs, *outputs)):
        raise ValueError("a Hessian's factor holds NaN or infinity; raise the damping")
    two_sided_ldlq(latents, inputs, outputs, encode)
    return [states.flatten(0, 1) for states in found]


def quantize_linear(
    weight: Tensor,
    hessian: Tensor | None,
    layer: LayerFormat,
    codebook: Tensor,
    *,
    bias: Tensor | None = None,
    damping: float = 0.01,
    seed: int = 0,
    backend: Backend = "auto",
) -> tuple[QuantizedLinear, LayerReport]:
    """``quantize_group`` of one weight matrix.

    Args:
        weight: [out, in].
        hessian: [in, in], E[x x^T]; None is plain Viterbi without error feedback.
        layer: its stored shape.
        codebook: float32 [S, V].
        bias: [out] or None.
        damping, seed, backend: see ``QuantizeConfig``.

    Raises:
        ValueError: weights with NaN or infinity, or a weight that is zero.
    """
    linear = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    options = {"weight": linear}, hessian, {"weight": layer}, {layer.code: codebook}
    found = quantize_group(*options, leader="weight", damping=damping, seed=seed, backend=backend)
    return found["weight"]
