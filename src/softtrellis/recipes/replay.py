"""Passes of training as CUDA graphs, as launching small steps takes longer than running them.

A graph repeats kernels on the same memory. So inputs are copied to where they were at its capture,
and the weights that a pass takes, and all gradients that it adds to, stay in one place
(``FixedPlaces``).
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from softtrellis.modules.latent_linear import LatentLinear

WARM_UP = 3
"""Calls of every shape that run as they are, in which PyTorch compiles and sets itself up."""

_OUTSIDE_CAPTURES: dict[str, Callable[..., Any]] = {
    "find_packed_sequence_indices": lambda position_ids: None,
    "is_tracing": lambda tensor=None: False,
}

Capture = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]
"""Captures a function on a device: what repeats it, and where its result then is."""


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream of warm-up and capture: autograd adds gradients up on the stream of the first."""
    return torch.cuda.Stream(device)


@cache
def _pool(device: torch.device) -> Any:
    """Memory of all graphs: none keeps anything in it but its result, which is copied at once."""
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()


def cuda_graph(
    function: Callable[[], Tensor], device: torch.device
) -> tuple[Callable[[], None], Tensor]:
    """Captures a function's launches, without running them."""
    gc.collect()  # a graph that is freed during a capture would spoil it
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=_pool(device), stream=_side(device)):
                result = function()
    finally:
        if collecting:
            gc.enable()
    return graph.replay, result


@contextmanager
def masks_as_outside_captures() -> Iterator[None]:
    """Lets transformers make the masks that it makes where nothing is captured, for whole windows.

    In a capture it cannot look whether a window holds several sequences, and assumes so; 5.17 also
    writes causal masks out. That would be other kernels than those that were warmed up, and
    compiled layers would be compiled anew, which a capture forbids.
    """
    before = {name: getattr(masking_utils, name) for name in _OUTSIDE_CAPTURES}
    for name, function in _OUTSIDE_CAPTURES.items():
        setattr(masking_utils, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(masking_utils, name, function)


class Replayed:
    """A function of tensors on a GPU that is captured once for every shape of theirs."""

    def __init__(self, function: Callable[..., Tensor], *, capture: Capture = cuda_graph) -> None:
        """Of a function that takes and returns tensors, and waits for nothing."""
        self._function, self._capture = function, capture
        self._calls = Counter[Hashable]()
        self._made: dict[Hashable, tuple[list[Tensor], Callable[[], None], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function returns; from the fourth call of a shape on by its graph."""
        key = tuple((x.shape, x.dtype) for x in inputs)
        self._calls[key] += 1
        with masks_as_outside_captures():
            if self._calls[key] <= WARM_UP:
                return self._warm_up(*inputs)
            if key not in self._made:
                places = [x.clone() for x in inputs]
                device = inputs[0].device
                replay, result = self._capture(lambda: self._function(*places), device)
                self._made[key] = places, replay, result
            places, replay, result = self._made[key]
            for place, x in zip(places, inputs, strict=True):
                place.copy_(x)
            replay()
        return result.clone()

    def _warm_up(self, *inputs: Tensor) -> Tensor:
        side = _side(inputs[0].device)
        here = torch.cuda.current_stream(inputs[0].device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            result = self._function(*inputs)
        here.wait_stream(side)
        return result


class FixedPlaces:
    """Keeps held weights, and the gradients of these and of other parameters, where they are."""

    def __init__(
        self,
        layers: Mapping[str, LatentLinear],
        parameters: Mapping[str, nn.Parameter],
        *,
        enabled: bool,
    ) -> None:
        """Of layers that this process has alone, and of all that is trained; or of nothing.

        Latents and scales get their gradients from those of held weights, by ``release``.
        """
        self._leaves: list[Tensor] = []
        self._gradients: list[Tensor] = []
        if not enabled:
            return
        own = {id(p) for layer in layers.values() for p in layer.parameters()}
        self._leaves += [layer.fix() for layer in layers.values()]
        self._leaves += [p for p in parameters.values() if id(p) not in own]
        self._gradients += [torch.zeros_like(leaf) for leaf in self._leaves]

    @torch.no_grad()
    def reset(self) -> None:
        """Sets all these gradients to 0, before the first pass of a step."""
        if self._gradients:
            torch._foreach_zero_(self._gradients)
        for leaf, gradient in zip(self._leaves, self._gradients, strict=True):
            leaf.grad = gradient
