"""A causal language model as training sees it: prefix, tail and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softtrellis.evaluation.perplexity import split_head
from softtrellis.modules.replace import decoder_layers, output_layer
from softtrellis.modules.tail import Tail
from softtrellis.recipes.losses import CHUNKS, forward_kl


class Network:
    """A causal language model as prefix, tail and head, see ``Tail``.

    Matmuls are computed in ``autocast``, except the head's, which keep float32 logits.
    """

    def __init__(
        self, model: nn.Module, first: int, window: Tensor, *, autocast: torch.dtype | None = None
    ) -> None:
        split = split_head(model, window)
        self._head, self.device = split.head, next(model.parameters()).device
        self._autocast = autocast
        self._whole = split.features
        cuttable = split.head is output_layer(model)
        self.tail = Tail(model, first, window.to(self.device)) if cuttable else None

    @property
    def first(self) -> int:
        """The decoder layer at which the tail starts; 0 where the model cannot be cut."""
        return self.tail.first if self.tail else 0

    @property
    def tf32(self) -> bool:
        """Whether the head's products may round their factors to TF32 (11 bits)."""
        return self._autocast is not None and self.device.type == "cuda"

    def _precision(self) -> torch.autocast:
        enabled = self._autocast is not None
        return torch.autocast(self.device.type, dtype=self._autocast, enabled=enabled)

    def prefix(self, ids: Tensor) -> Tensor:
        """int64 [b, ctx] to what ``features`` takes, without gradients."""
        ids = ids.to(self.device)
        with self._precision():
            return self.tail.prefix(ids) if self.tail else ids

    def features(self, states: Tensor) -> Tensor:
        """What the head takes, [b * (ctx - 1), d]: all positions but the last."""
        with self._precision():
            if self.tail is None:
                return self._whole(states)
            return self.tail.features(states)[:, :-1].flatten(0, 1)

    def head(self, features: Tensor) -> Tensor:
        """Features [n, d] to float32 logits [n, vocabulary]; bfloat16 is too coarse for them."""
        return self._head(features.float())


def divergence(student: Network, features: Tensor, teacher: Network, targets: Tensor) -> Tensor:
    """Mean KL(teacher || student) per position, in nats; see ``forward_kl``.

    Args:
        student: that the gradient flows into, through ``features``.
        features: [n, d], of the student.
        teacher: as frozen.
        targets: [n, d'], the teacher's features of the same positions.

    Returns:
        float32 [].
    """
    with _float32_products(tf32=student.tf32 and teacher.tf32):
        return forward_kl(
            features, student.head, targets, teacher.head, chunk=CHUNKS[student.device.type]
        )


@contextmanager
def _float32_products(*, tf32: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def wrap_layers_(
    model: nn.Module, *, compiled: bool = False, recomputed: bool = False, first: int = 0
) -> Callable[[], None]:
    """Changes how decoder layers run; returns the undoing.

    Args:
        model: a causal language model.
        compiled: by ``torch.compile``, as one graph for all layers that are alike.
        recomputed: keep no activations, but compute them again in the backward pass.
        first: those before this one run as they are.
    """
    _, layers = decoder_layers(model)
    wrapped = list(layers)[first:] if compiled or recomputed else []
    for layer in wrapped:
        forward = torch.compile(layer.forward) if compiled else layer.forward
        layer.forward = _recomputed(forward) if recomputed else forward

    def undo() -> None:
        for layer in wrapped:
            del layer.forward

    return undo


@contextmanager
def layers_compiled(model: nn.Module, compiled: bool, first: int = 0) -> Iterator[None]:
    """``wrap_layers_`` for a while."""
    undo = wrap_layers_(model, compiled=compiled, first=first)
    try:
        yield
    finally:
        undo()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
