"""The training layer: latent weights, and codewords computed from them on every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from softtrellis.backend import Backend
from softtrellis.modules.latent_stacks import batches, codewords_of, stacks, states_of, weights_of
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.modules.tile_share import TileShare
from softtrellis.quantizers.basis import WeightBasis
from softtrellis.quantizers.soft import MIX, Estimator, check_estimator
from softtrellis.quantizers.tiling import from_tiles, to_tiles
from softtrellis.trellis.bitshift import overlap_in
from softtrellis.trellis.packing import pack, unpack

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class LatentLinear(nn.Module):
    """A linear layer trained through its trellis (BCJR-QAT, arXiv 2605.10655, section 3).

    The latent weights live in the rotated basis, in the codebook's units. Both ends of every path
    stay pinned to the overlap of a hard tail-biting code, so that T to 0 gives a code that packs.

    Where several ranks share the layer (``share``), each has the latent weights, pins and start of
    its own tiles only, and computes the codewords of these. ``fully_shard`` of a module around the
    layer spreads ``codewords`` likewise and gathers them when that module runs; a pass makes the
    weight from them, and its backward pass makes it again. ``hold``, ``release``, ``weight`` and
    whatever gives hard codes are called by all ranks together, with the same layers.

    Attributes:
        latent: float32 parameter [out_pad, in_pad]; with a ``share``, [own tiles, N, V].
        pins: int32 buffer [own tiles], the overlap at both ends.
        start: int32 buffer [own tiles, N], the states at the start.
        share: this rank's part of the tiles; None is all of them.
        codewords: with a ``share`` a float32 parameter [tiles, N, V], what passes make the weight
            of; ``hold`` sets them, and until ``release`` their gradient collects the passes'.
            None without.
        calls: forward passes so far; counted with a ``share`` only.
        variance: of the latent weights at the start, about.
        temperature: T over ``variance``; set it before every pass. A tensor [] on the
            layer's device where a CUDA graph or ``torch.compile`` is to follow its changes: every
            new number would be compiled anew.
        estimator: "soft", "straight_through", "mixed" or "identity"; mix, bcjr_stride and turn, see
            ``estimate``. Set ``turn`` before every pass, as the temperature.
        codes: int32 [own tiles, N], states that "identity" takes for the hard code, see
            ``find_codes``; None is to look for them in every pass.
        backend: as in ``bcjr``.
        in_scale, out_scale: float32 parameters [in_features] and [out_features] once
            ``train_scales`` was called; None before.
        held: [out_features, in_features], the weight that passes take between ``hold`` and
            ``release``; its gradient collects theirs. With a ``share`` always None.
    """

    pins: Tensor
    start: Tensor
    bias: Tensor | None
    in_scale: nn.Parameter | None
    out_scale: nn.Parameter | None
    codewords: nn.Parameter | None

    def __init__(
        self,
        layer: LayerFormat,
        codebook: Tensor,
        basis: WeightBasis,
        states: Tensor,
        bias: Tensor | None,
        *,
        estimator: Estimator = "soft",
        mix: float = MIX,
        bcjr_stride: int = 1,
        temperature: float | Tensor = 0.1,
        backend: Backend = "auto",
        share: TileShare | None = None,
    ) -> None:
        """Starts at the codewords of tail-biting states int [tiles, N], all of them.

        Raises:
            ValueError: an unknown estimator.
        """
        super().__init__()
        check_estimator(estimator)
        self.layer, self.codebook, self.basis = layer, codebook, basis
        self.estimator: Estimator = estimator
        self.mix, self.bcjr_stride, self.turn = mix, bcjr_stride, 0
        self.codes: Tensor | None = None
        self.temperature, self.backend = temperature, backend
        self.variance = layer.code.sigma(codebook) ** 2
        self.share = share
        own = states if share is None else states[share.owned].clone()
        self.register_buffer("start", own.to(torch.int32))
        self.register_buffer("pins", overlap_in(self.start[:, 0], layer.code.spec))
        self.latent = nn.Parameter(
            layer.code.decode(states, codebook, *layer.padded)
            if share is None
            else codebook[own.to(torch.int64)]
        )
        self.register_buffer("bias", bias)
        self.register_parameter("in_scale", None)
        self.register_parameter("out_scale", None)
        whole = None if share is None else nn.Parameter(codebook[states.to(torch.int64)])
        self.register_parameter("codewords", whole)
        self.calls = 0
        self.held: Tensor | None = None
        self._fixed: Tensor | None = None
        self._graph: Tensor | None = None
        self._hard_weight: Callable[[], Tensor] | None = None

    @classmethod
    def from_quantized(
        cls,
        module: QuantizedLinear,
        *,
        estimator: Estimator = "soft",
        mix: float = MIX,
        bcjr_stride: int = 1,
        temperature: float | Tensor = 0.1,
        backend: Backend = "auto",
        mesh: DeviceMesh | None = None,
    ) -> LatentLinear:
        """The training layer that starts from a quantized layer's codes.

        ``mesh`` are the ranks that share its tiles, where there are several.
        """
        return cls(
            module.layer,
            module.codebook,
            module.basis(),
            module.states(),
            module.bias,
            estimator=estimator,
            mix=mix,
            bcjr_stride=bcjr_stride,
            temperature=temperature,
            backend=backend,
            share=None if mesh is None else TileShare(mesh, module.layer.tiles),
        )

    def tiles(self) -> Tensor:
        """[own tiles, N, V], the latent weights along the trellis; differentiable."""
        if self.share is not None:
            return self.latent
        return to_tiles(self.latent, self.layer.code.spec, self.layer.code.order)

    def own(self, matrix: Tensor) -> Tensor:
        """A latent matrix [out_pad, in_pad] in the shape of ``latent``."""
        if self.share is None:
            return matrix
        tiles = to_tiles(matrix, self.layer.code.spec, self.layer.code.order)
        return tiles[self.share.owned]

    def train_scales(self) -> dict[str, nn.Parameter]:
        """Makes the scales of input and output channels parameters, where there are none as ones.

        They are stored as float16 with the hard code.

        Returns:
            "in_scale" [in_features] and "out_scale" [out_features], float32.
        """
        starts = self.basis.in_scale, self.basis.out_scale
        sizes = self.layer.in_features, self.layer.out_features
        self.in_scale, self.out_scale = (
            nn.Parameter(self.latent.new_ones(size) if start is None else start.float())
            for start, size in zip(starts, sizes, strict=True)
        )
        self.layer = replace(self.layer, in_scales=True, channel_scales=True)
        return {"in_scale": self.in_scale, "out_scale": self.out_scale}

    def current_basis(self) -> WeightBasis:
        """The basis with the scales as they are now; differentiable in them."""
        if self.in_scale is None:
            return self.basis
        return replace(self.basis, in_scale=self.in_scale, out_scale=self.out_scale)

    def weight(self) -> Tensor:
        """[out_features, in_features] at the current temperature, differentiable."""
        own = codewords_of([self])
        return self._weight_of(own if self.share is None else self.share.gather(own))

    def _weight_of(self, codewords: Tensor) -> Tensor:
        latent = from_tiles(codewords, *self.layer.padded, self.layer.code.order)
        return self.current_basis().to_weight(latent)

    def _all_states(self, own: Tensor) -> Tensor:
        """int32 [tiles, N] of every rank's own tail-biting states; they travel packed."""
        if self.share is None:
            return own
        spec = self.layer.code.spec
        return unpack(self.share.gather_bytes(pack(own, spec)), spec, steps=spec.steps())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        if self.codewords is not None:
            self.calls += 1
            y: Tensor = checkpoint(
                self._multiply, x, self.codewords, use_reentrant=False, preserve_rng_state=False
            )
            return y
        weight = self.weight() if self.held is None else self.held
        return functional.linear(x, weight.to(x.dtype), self.bias)

    def _multiply(self, x: Tensor, codewords: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            hard = self._hard_weight
            weight = self._weight_of(codewords.float()) if hard is None else hard()
        return functional.linear(x, weight.to(x.dtype), self.bias)

    def fix(self) -> Tensor:
        """[out_features, in_features], where ``hold`` puts the weight from now on; no ``share``."""
        size = self.layer.out_features, self.layer.in_features
        self._fixed = self.latent.new_empty(size).requires_grad_()
        return self._fixed

    def hold_hard(self, hardened: QuantizedLinear) -> None:
        """Lets passes take the weight of what ``harden`` gave, until ``release``; no gradients.

        With a ``share`` it is decoded in every pass, so that no weight stays whole.
        """
        if self.share is None:
            self.held = hardened.weight()
        else:
            self._hard_weight = hardened.weight

    def _hold(self, made: Tensor) -> None:
        """Lets passes take this weight [out, in], or with a ``share`` codewords [own tiles, N, V].

        Its graph is kept, and carries the gradient of ``_release``.
        """
        self._graph = made
        if self._fixed is not None:
            self.held = self._fixed
            with torch.no_grad():
                self.held.copy_(made)
            return
        if self.share is None:
            self.held = made.detach().requires_grad_(made.requires_grad)
            return
        assert self.codewords is not None
        self.share.local(self.codewords).copy_(made.detach())

    def _release(self) -> tuple[Tensor, Tensor] | None:
        """What ``_hold`` was given, with its gradient, if there is one."""
        graph, held = self._graph, self.held
        self._graph = self.held = self._hard_weight = None
        if self.share is None:
            gradient = None if held is None else held.grad
        else:
            assert self.codewords is not None
            gradient, self.codewords.grad = self.codewords.grad, None
            gradient = None if gradient is None else self.share.local(gradient)
        if graph is None or gradient is None or not graph.requires_grad:
            return None
        return graph, gradient

    def start_states(self) -> Tensor:
        """int32 [tiles, N]: the code that training started from."""
        return self._all_states(self.start)

    @torch.no_grad()
    def changed(self, states: Tensor) -> Tensor:
        """bool [own tiles, N]: where states of the own tiles have other codewords than ``start``.

        States alone say little: at L = 16 HYB has one codeword for a state and its complement.
        """
        new, start = (self.codebook[x.to(torch.int64)] for x in (states, self.start))
        return (new != start).any(2)

    @torch.no_grad()
    def hard_states(self) -> Tensor:
        """int32 [tiles, N]: the code that T to 0 leads to with the current pins."""
        return self._all_states(states_of([self], closed=False))

    @torch.no_grad()
    def reencode(self) -> None:
        """Moves the pins to where tail-biting Viterbi now closes the paths."""
        self.pins = overlap_in(states_of([self], closed=True)[:, 0], self.layer.code.spec)

    def harden(self, states: Tensor | None = None) -> QuantizedLinear:
        """The inference layer of the hard code; its weight is what is saved, bit for bit.

        ``states`` are ``hard_states()`` where they are known.
        """
        basis = self.basis
        if self.in_scale is not None and self.out_scale is not None:
            scales = self.in_scale.detach().half(), self.out_scale.detach().half()
            basis = replace(basis, in_scale=scales[0], out_scale=scales[1])
        states = self.hard_states() if states is None else states
        return QuantizedLinear.from_states(
            self.layer, self.codebook.detach(), states, basis, self.bias
        )

    def extra_repr(self) -> str:
        """Shape and estimator, for ``print(model)``."""
        return (
            f"in_features={self.layer.in_features}, out_features={self.layer.out_features}, "
            f"estimator={self.estimator}"
        )


def hold(layers: Iterable[LatentLinear]) -> None:
    """Computes the layers' codewords once for any number of passes, until ``release``.

    Of layers that this process has alone, their weights. Where gradients are enabled the graph is
    kept, and the passes see codewords or weights of their own that collect gradients.
    """
    for batch in batches(layers):
        found = list(stacks(batch))
        counts = [[len(layer.pins) for layer in stack] for stack in found]
        values = codewords_of(batch).split([sum(count) for count in counts])
        for stack, count, own in zip(found, counts, values, strict=True):
            alone = stack[0].share is None
            made = weights_of(stack, own).unbind() if alone else own.split(count)
            for layer, one in zip(stack, made, strict=True):
                layer._hold(one)


@torch.no_grad()
def find_codes(layers: Iterable[LatentLinear]) -> None:
    """Sets ``codes``, all at once, to the hard code of the latents and pins as they are now."""
    for layer, own in _own_states(layers, closed=False):
        layer.codes = own


@contextmanager
def searching(layers: Sequence[LatentLinear]) -> Iterator[None]:
    """Lets layers look for their codes in every pass, for a while."""
    codes = [layer.codes for layer in layers]
    for layer in layers:
        layer.codes = None
    try:
        yield
    finally:
        for layer, own in zip(layers, codes, strict=True):
            layer.codes = own


def release(layers: Iterable[LatentLinear]) -> None:
    """Ends ``hold``, and carries the gradients that were collected to the parameters."""
    for batch in batches(layers):
        pairs = [pair for layer in batch if (pair := layer._release()) is not None]
        if pairs:
            torch.autograd.backward([graph for graph, _ in pairs], [grad for _, grad in pairs])


@torch.no_grad()
def hard_states(layers: Iterable[LatentLinear]) -> Iterator[tuple[LatentLinear, Tensor]]:
    """Every layer with its ``hard_states()``, encoded together."""
    for layer, own in _own_states(layers, closed=False):
        yield layer, layer._all_states(own)


@torch.no_grad()
def reencode(layers: Iterable[LatentLinear]) -> None:
    """``reencode()`` of every layer, encoded together."""
    for layer, own in _own_states(layers, closed=True):
        layer.pins = overlap_in(own[:, 0], layer.layer.code.spec)


def _own_states(
    layers: Iterable[LatentLinear], *, closed: bool
) -> Iterator[tuple[LatentLinear, Tensor]]:
    """Every layer with the ``states_of`` its own tiles."""
    for batch in batches(layers):
        counts = [len(layer.pins) for layer in batch]
        yield from zip(batch, states_of(batch, closed=closed).split(counts), strict=True)
