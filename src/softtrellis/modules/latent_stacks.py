"""Training layers together: which ones, and what is computed for them at once.

Launches cost a GPU's CPU more than small layers cost the GPU, so layers that one call of the
trellis can serve share it, and those of one shape share the rotation back to weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softtrellis.quantizers.basis import to_weights
from softtrellis.quantizers.soft import Estimator, estimate, identity
from softtrellis.quantizers.tiling import from_tiles, to_tiles
from softtrellis.trellis.viterbi import best_states

if TYPE_CHECKING:
    from softtrellis.modules.latent_linear import LatentLinear

MOST_TILES = 1 << 17
"""Tiles whose codewords are computed together, of several layers where these are small."""


def alike(layers: Iterable[LatentLinear]) -> Iterator[list[LatentLinear]]:
    """Neighbours that one call of the trellis can serve: of one code, codebook and temperature."""
    return _runs(layers, _alike)


def stacks(layers: Iterable[LatentLinear]) -> Iterator[list[LatentLinear]]:
    """Neighbours of one shape, whose weights are made together."""
    return _runs(layers, lambda a, b: _shape(a) == _shape(b))


def _runs(
    layers: Iterable[LatentLinear], same: Callable[[LatentLinear, LatentLinear], bool]
) -> Iterator[list[LatentLinear]]:
    run: list[LatentLinear] = []
    for layer in layers:
        if run and not same(run[0], layer):
            yield run
            run = []
        run.append(layer)
    if run:
        yield run


def batches(layers: Iterable[LatentLinear]) -> Iterator[list[LatentLinear]]:
    """``alike`` layers with ``MOST_TILES`` at most, or a single larger one; by shape.

    The same ones on every rank, so that all ranks gather in one order.
    """
    for neighbours in alike(layers):
        shapes: dict[Hashable, list[LatentLinear]] = {}
        for layer in neighbours:
            shapes.setdefault(_shape(layer), []).append(layer)
        batch: list[LatentLinear] = []
        tiles = 0
        for layer in chain.from_iterable(shapes.values()):
            most = layer.layer.tiles if layer.share is None else layer.share.most
            if batch and tiles + most > MOST_TILES:
                yield batch
                batch, tiles = [], 0
            batch.append(layer)
            tiles += most
        yield batch


def _shape(layer: LatentLinear) -> Hashable:
    format_, basis = layer.layer, layer.basis
    scales = layer.in_scale is not None, basis.out_scale is not None, basis.in_scale is not None
    sizes = format_.out_features, format_.in_features, format_.multiple, format_.block
    return sizes, format_.code.order, scales, layer.share is None


def _alike(a: LatentLinear, b: LatentLinear) -> bool:
    if a.codebook is not b.codebook or a.temperature is not b.temperature:
        return False
    return (a.layer.code.spec, a.backend, *_how(a)) == (b.layer.code.spec, b.backend, *_how(b))


def _how(layer: LatentLinear) -> tuple[Estimator, float, int, int]:
    return layer.estimator, layer.mix, layer.bcjr_stride, layer.turn


def codewords_of(layers: Sequence[LatentLinear]) -> Tensor:
    """[tiles of all, N, V], the codewords of layers that are alike."""
    first, tiles = layers[0], _tiles(layers)
    codes = [layer.codes for layer in layers if layer.codes is not None]
    if first.estimator == "identity" and len(codes) == len(layers):
        return identity(tiles, first.codebook, torch.cat(codes))
    return estimate(
        tiles,
        first.codebook,
        first.layer.code.spec,
        estimator=first.estimator,
        temperature=first.temperature * first.variance,
        pins=torch.cat([layer.pins for layer in layers]),
        mix=first.mix,
        bcjr_stride=first.bcjr_stride,
        turn=first.turn,
        backend=first.backend,
    )


def weights_of(stack: Sequence[LatentLinear], codewords: Tensor) -> Tensor:
    """[n, out_features, in_features] of n layers of one shape, from [n tiles, N, V]."""
    layer = stack[0].layer
    latents = from_tiles(codewords.unflatten(0, (len(stack), -1)), *layer.padded, layer.code.order)
    return to_weights([layer.current_basis() for layer in stack], latents)


def _tiles(layers: Sequence[LatentLinear]) -> Tensor:
    """[tiles of all, N, V], the latent weights of layers along the trellis; differentiable."""
    parts: list[Tensor] = []
    for stack in stacks(layers):
        latents: list[Tensor] = [layer.latent for layer in stack]
        if stack[0].share is not None:
            parts += latents
        else:
            code = stack[0].layer.code
            parts.append(to_tiles(torch.stack(latents), code.spec, code.order).flatten(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def states_of(layers: Sequence[LatentLinear], *, closed: bool) -> Tensor:
    """int32 [tiles of all, N]: hard codes, pinned as they are or tail-biting anew."""
    first = layers[0]
    pins = torch.cat([layer.pins for layer in layers])
    return best_states(
        _tiles(layers),
        first.codebook,
        first.layer.code.spec,
        ends="tail_biting" if closed else pins,
        backend=first.backend,
    )
