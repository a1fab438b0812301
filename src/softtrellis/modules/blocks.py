"""Running a model's decoder layers one at a time on stored hidden states.

Only the layer in hand has to be on the device, so that a model larger than the device's memory can
be quantized there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softtrellis.modules.replace import decoder_layers, on_device
from softtrellis.modules.tail import run_prefix

_log = logging.getLogger(__name__)
_NOT_ALONE = (
    "this model's decoder layers cannot be run one at a time: they depend on more than the hidden "
    "states that enter them"
)
_TOLERANCE, _AUTOCAST_TOLERANCE = 1e-3, 5e-2


@dataclass(frozen=True)
class Call:
    """What a decoder layer is called with, apart from its hidden states.

    Attributes:
        args, kwargs: the other arguments.
        by_name: whether the hidden states are passed as ``hidden_states=``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def output(self, layer: nn.Module, states: Tensor) -> Any:
        """What the layer returns for hidden states [b, ctx, d]."""
        if self.by_name:
            return layer(*self.args, hidden_states=states, **self.kwargs)
        return layer(states, *self.args, **self.kwargs)


def _changeable(call: Call) -> bool:
    """Whether a layer is handed a dictionary, in which it may leave something for the next one."""
    return any(isinstance(value, dict) for value in (*call.args, *call.kwargs.values()))


def _hidden(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


class _StandIn(nn.Module):
    """Takes a decoder layer's place; has the layer's attributes, but not its parameters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that it is no submodule and stays where it is

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)


class _Catcher(_StandIn):
    """Keeps what a layer is called with, and passes it on.

    The first call of the first layer runs the layer, to see how layers return their output.
    """

    def __init__(self, layer: nn.Module, first: _Catcher | None) -> None:
        super().__init__(layer)
        self._first = [first or self]
        self.size: int | None = None  # of the tuple that layers return; 0 for a tensor
        self.states: list[Tensor] = []
        self.call: Call | None = None
        self.last: Call | None = None
        self.always_alike = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_name = not args
        states = kwargs.pop("hidden_states") if by_name else args[0]
        self.states.append(states)
        call = Call(args[1:], kwargs, by_name)
        if self.call is None:
            self.call = call
        self.last, first = call, self._first[0]
        compared = first is not self and _same(first.call, self.call) and _same(first.last, call)
        if not compared:
            self.always_alike &= _alike(self.call.args, call.args)
            self.always_alike &= _alike(self.call.kwargs, call.kwargs)
        if first.size is None:
            output = call.output(self._layer[0], states)
            first.size = len(output) if isinstance(output, tuple) else 0
            return output
        return _returned(states, first.size)


class _Replay(_StandIn):
    """Passes hidden states on, or the ones it was given."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__(layer)
        self._size = size
        self.given: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        states = states if self.given is None else self.given
        return _returned(states, self._size)


def _returned(states: Tensor, size: int) -> Any:
    """Hidden states as a layer returns them: in a tuple of a size, or alone if that is 0."""
    return (states, *[None] * (size - 1)) if size else states


def _same(a: Call | None, b: Call) -> bool:
    """Whether two calls hand over the same objects."""
    if a is None or a.kwargs.keys() != b.kwargs.keys() or len(a.args) != len(b.args):
        return False
    ours, theirs = (*a.args, *a.kwargs.values()), (*b.args, *(b.kwargs[key] for key in a.kwargs))
    return all(x is y for x, y in zip(ours, theirs, strict=True))


def _alike(a: Any, b: Any) -> bool:
    """Whether two arguments of a layer hold the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    return type(a) is type(b) and not isinstance(a, Tensor)


class Blocks:
    """The decoder layers of a causal language model, and what enters the first of them.

    Attributes:
        prefix: the name of the list of decoder layers.
        layers: the decoder layers, each wherever it was.
        calls: a ``Call`` for each layer.
        states: [n, ctx, d], what enters the first layer, on ``device``.
        batch: windows that a layer takes at once; 1 where its other arguments fix that.
        device: where layers run.
        autocast: what matmuls are computed in, or None for what the weights are in.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        windows: Tensor,
        *,
        device: torch.device,
        batch: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Finds out how the model calls its layers, with windows int64 [n, ctx] of tokens.

        Raises:
            ValueError: a model whose decoder layers cannot be run one at a time.
        """
        self.device, self.autocast = device, autocast
        self.prefix, self.layers = decoder_layers(model)
        self._base: nn.Module = getattr(model, "base_model", model)
        self._windows = windows
        catchers: list[_Catcher] = []
        for layer in self.layers:
            catchers.append(_Catcher(layer, catchers[0] if catchers else None))
        with self.on_device(0), self._without_layers(catchers):
            for window in windows:
                with self.precision():
                    run_prefix(model, window[None].to(device))
        self._size = catchers[0].size or 0
        self.calls = [catcher.call for catcher in catchers if catcher.call is not None]
        alike = all(catcher.always_alike for catcher in catchers)
        if len(self.calls) < len(catchers) or not alike or any(map(_changeable, self.calls)):
            raise ValueError(_NOT_ALONE)
        self.states = torch.cat([states.detach() for states in catchers[0].states])
        second = catchers[1].states[0] if len(catchers) > 1 else None
        for catcher in catchers:  # which are in cycles with themselves
            catcher.states.clear()
        with self.on_device(0):
            if second is not None:
                self._check_replay(second)
            self.batch = batch if self._takes(min(batch, len(windows))) else 1
        if self.batch < batch:
            _log.warning("this model's layers take one window at a time; that is slower")

    @contextmanager
    def _without_layers(self, others: Sequence[nn.Module]) -> Iterator[None]:
        """The model on the device, with others in the place of its decoder layers."""
        with _exchanged(self.layers, others), on_device(self._base, self.device):
            yield

    @torch.no_grad()
    def last_hidden(self, states: Tensor) -> Tensor:
        """What the output layer takes, [n, ctx, d], from what the last decoder layer returned."""
        replays = [_Replay(layer, self._size) for layer in self.layers]
        found = []
        with self._without_layers(replays):
            for i, window in enumerate(self._windows):
                replays[-1].given = states[i : i + 1]
                ids = window[None].to(self.device)
                with self.precision():
                    hidden = self._base(input_ids=ids, use_cache=False).last_hidden_state
                found.append(hidden)
        return torch.cat(found)

    @contextmanager
    def on_device(self, index: int) -> Iterator[nn.Module]:
        """A decoder layer on the device, and back where it was afterwards."""
        with on_device(self.layers[index], self.device):
            yield self.layers[index]

    def run(self, index: int, states: Tensor, layer: nn.Module | None = None) -> Tensor:
        """What a layer that is on the device makes of hidden states [b, ctx, d].

        ``layer`` may be another one for its place, a copy for instance.
        """
        with self.precision():
            return _hidden(self.calls[index].output(layer or self.layers[index], states))

    @torch.no_grad()
    def run_all(
        self,
        index: int,
        states: Tensor,
        *,
        layer: nn.Module | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``run`` on [n, ctx, d], in batches; into ``out``, which may be ``states``."""
        found = out
        for first in range(0, len(states), self.batch):
            part = slice(first, first + self.batch)
            output = self.run(index, states[part], layer)
            if found is None:
                found = output.new_empty(len(states), *output.shape[1:])
            found[part] = output
        assert found is not None
        return found

    def precision(self) -> torch.autocast:
        """A context in which matmuls are computed in ``autocast``."""
        enabled = self.autocast is not None
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=enabled)

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        tolerance = _TOLERANCE if self.autocast is None else _AUTOCAST_TOLERANCE
        return bool((found - expected).norm() <= tolerance * expected.norm())

    def _check_replay(self, expected: Tensor) -> None:
        found = self.run(0, self.states[:1])
        if found.shape != expected.shape or not self._close(found, expected):
            raise ValueError(_NOT_ALONE)

    def _takes(self, count: int) -> bool:
        """Whether the first layer takes several windows as it takes one."""
        one = torch.cat([self.run(0, part) for part in self.states[:count].split(1)])
        try:
            return self._close(self.run(0, self.states[:count]), one)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # other arguments fix the number of windows
            return False


@contextmanager
def _exchanged(layers: nn.ModuleList, others: Sequence[nn.Module]) -> Iterator[None]:
    """Puts other modules in the places of a list, for a while."""
    kept = list(layers)
    for i, module in enumerate(others):
        layers[i] = module
    try:
        yield
    finally:
        for i, module in enumerate(kept):
            layers[i] = module
