"""What training minimises: the student's divergence from its teacher, window by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from softtrellis.modules.replace import decoder_index, linear_names, quantized_layers
from softtrellis.recipes.network import Network, divergence
from softtrellis.recipes.ranks import Ranks
from softtrellis.recipes.replay import Replayed
from softtrellis.recipes.sharded_layers import ShardedLayers
from softtrellis.recipes.training_text import TrainingWindows

_CACHE_BYTES = 2 << 30


class Objective:
    """KL(teacher || student) on windows of text, of which every rank takes its share.

    The decoder layers before the first trained one run once per window, while that fits the cache
    and windows come again; the whole teacher likewise.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        first: int,
        windows: TrainingWindows,
        held_out: Tensor,
        ranks: Ranks,
        sharded: ShardedLayers | None = None,
        *,
        dtype: torch.dtype,
        graphs: bool = False,
    ) -> None:
        """See ``Trainer``.

        ``first`` is the first decoder layer that is trained; ``sharded`` are the student's layers
        where several ranks share them, ``dtype`` is that of matrix products; ``graphs`` repeats
        passes as CUDA graphs.
        """
        self.windows, self.held_out, self._ranks = windows, held_out, ranks
        self._sharded, window = sharded, windows.first[0]
        autocast = None if dtype == torch.float32 else dtype
        inside = set(linear_names(student)) & quantized_layers(student).keys()
        before = [name for name in inside if decoder_index(student, name) < first]
        networks = (
            Network(model, first, window, autocast=autocast) for model in (teacher, student)
        )
        self._teacher, self._student = networks
        self._shared_prefix = self._teacher.first == self._student.first and not before
        self._graphs = graphs
        self._targets: Callable[[Tensor], Tensor] = self._teacher.features
        if graphs:
            self._targets = Replayed(self._targets)
        self._passes: dict[float, Replayed] = {}
        self._cache: dict[tuple[bool, int], tuple[Tensor, Tensor]] = {}
        self._cached_bytes = 0

    def parts(self, rows: Sequence[int], size: int) -> list[Sequence[int]]:
        """This rank's share of windows, ``size`` or fewer at once; as many parts on every rank.

        A part may be empty: ranks that share both models run them together, see ``loss``.
        """
        own = rows[self._ranks.part(len(rows))]
        return [own[i : i + size] for i in range(0, self._ranks.most(len(rows)), size)]

    @torch.no_grad()
    def _inputs(self, rows: Sequence[int], *, held_out: bool) -> list[tuple[Tensor, Tensor]]:
        """The student's prefix states and the teacher's features of every window, cached."""
        again = held_out or not self.windows.shift
        missing = [row for row in rows if (held_out, row) not in self._cache]
        found = {row: self._cache[held_out, row] for row in rows if row not in missing}
        (needed,) = self._ranks.any(bool(missing))
        if missing:
            ids = self.held_out[missing] if held_out else self.windows.tokens(missing)
            states = self._teacher.prefix(ids)
            targets = self._targets(states).unflatten(0, (len(missing), -1))
            if not self._shared_prefix:
                states = self._student.prefix(ids)
            for row, state, target in zip(missing, states, targets, strict=True):
                found[row] = state, target
                size = sum(t.numel() * t.element_size() for t in (state, target))
                if again and self._cached_bytes + size <= _CACHE_BYTES:
                    self._cache[held_out, row] = state.clone(), target.clone()
                    self._cached_bytes += size
        elif needed:  # the teacher's parts that lie here
            self._teacher.features(self._teacher.prefix(self.windows.first[:1]))
        return [found[row] for row in rows]

    def loss(self, rows: Sequence[int], *, held_out: bool = False) -> Tensor:
        """float32 [], the mean divergence per position of windows, in nats.

        Of no windows it is that of the first one to train on, which counts 0 times: its backward
        pass is run with those of the other ranks.
        """
        return self._divergence(*self._stacked(rows or (0,), held_out=held_out and bool(rows)))

    def backward(self, rows: Sequence[int], weight: float) -> Tensor:
        """Adds the gradients of ``weight`` times ``loss``; float32 [], that."""
        states, targets = self._stacked(rows or (0,), held_out=False)
        if not self._graphs:
            return _gradients(self._divergence, weight, states, targets)
        if weight not in self._passes:
            run = partial(_divergence, self._student, self._teacher)
            self._passes[weight] = Replayed(partial(_gradients, run, weight))
        return self._passes[weight](states, targets)

    def _stacked(self, rows: Sequence[int], *, held_out: bool) -> tuple[Tensor, Tensor]:
        pairs = self._inputs(rows, held_out=held_out)
        states = torch.stack([state for state, _ in pairs])
        return states, torch.cat([target for _, target in pairs])

    def _divergence(self, states: Tensor, targets: Tensor) -> Tensor:
        if self._sharded is None:
            return _divergence(self._student, self._teacher, states, targets)
        features = self._sharded(self._student.features, states)
        return divergence(self._student, features, self._teacher, targets)


def _divergence(student: Network, teacher: Network, states: Tensor, targets: Tensor) -> Tensor:
    return divergence(student, student.features(states), teacher, targets)


def _gradients(
    loss_of: Callable[[Tensor, Tensor], Tensor], weight: float, states: Tensor, targets: Tensor
) -> Tensor:
    """Adds the gradients of a weighted loss; its value."""
    loss = loss_of(states, targets) * weight
    loss.backward()
    return loss.detach()
