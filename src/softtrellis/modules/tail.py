"""Running only the part of a model behind a decoder layer, on stored hidden states."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softtrellis.modules.replace import decoder_layers

_log = logging.getLogger(__name__)


class _Reached(Exception):
    """Ends a forward pass at the layer where it is wanted."""


@contextmanager
def stop_before(model: nn.Module, index: int) -> Any:
    """Ends forward passes inside the context before decoder layer ``index`` runs.

    Yields a list whose last entry is what went into that layer, [b, ctx, d]. An index past the
    last layer ends nothing.
    """
    seen: list[Tensor] = []
    _, layers = decoder_layers(model)

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = None
    if index < len(layers):
        handle = layers[index].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def run_prefix(model: nn.Module, ids: Tensor) -> None:
    """A forward pass of the base model that ``stop_before`` may cut short."""
    base = getattr(model, "base_model", model)
    try:
        base(input_ids=ids, use_cache=False)
    except _Reached:
        return


class Tail:
    """The part of a causal language model from decoder layer ``first`` on.

    ``prefix`` gives the hidden states that enter that layer, ``features`` takes them to the last
    hidden states. Where a model's layers cannot be run like that (checked on the given window),
    ``first`` is 0 and the prefix is the token ids themselves.
    """

    def __init__(self, model: nn.Module, first: int, window: Tensor) -> None:
        """Args: the model, the decoder layer to start at, and one window of ids [ctx]."""
        self.model, self.first = model, first
        self._tail: Callable[[Tensor], Tensor] | None = None
        if first == 0:
            return
        self._tail = _run_from(model, first)
        probe = window[None, : min(64, window.shape[0])]
        with torch.no_grad():
            expected, found = _last_hidden(model, probe), self._try(probe)
        tolerance = 1e-4 * expected.abs().max()
        if found is None or bool((found - expected).abs().max() > tolerance):
            _log.warning("this model cannot be run from layer %d on; it runs whole, slower", first)
            self.first, self._tail = 0, None

    def _try(self, probe: Tensor) -> Tensor | None:
        try:
            return self.features(self.prefix(probe))
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
            return None

    def prefix(self, ids: Tensor) -> Tensor:
        """int64 [b, ctx] to what ``features`` takes: hidden states [b, ctx, d], or the ids."""
        if self._tail is None:
            return ids
        with torch.no_grad(), stop_before(self.model, self.first) as seen:
            run_prefix(self.model, ids)
        states: Tensor = seen[-1]
        return states

    def features(self, states: Tensor) -> Tensor:
        """The last hidden states [b, ctx, d], with gradients."""
        return _last_hidden(self.model, states) if self._tail is None else self._tail(states)


def _last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    base = getattr(model, "base_model", model)
    states: Tensor = base(input_ids=ids, use_cache=False).last_hidden_state
    return states


def _run_from(model: nn.Module, first: int) -> Callable[[Tensor], Tensor]:
    prefix, layers = decoder_layers(model)
    base = getattr(model, "base_model", model)
    base_name = next(name for name, module in model.named_modules() if module is base)
    shallow = copy.copy(base)
    shallow._modules = dict(base._modules)
    path = prefix[len(base_name) :].strip(".").split(".")
    holder = shallow
    for name in path[:-1]:
        child = copy.copy(holder._modules[name])
        assert child is not None
        child._modules = dict(child._modules)
        holder._modules[name] = child
        holder = child
    holder._modules[path[-1]] = nn.ModuleList(layers[first:])

    def run(states: Tensor) -> Tensor:
        hidden: Tensor = shallow(inputs_embeds=states, use_cache=False).last_hidden_state
        return hidden

    return run
