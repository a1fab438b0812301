"""Second moments of the inputs of linear layers, one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from softtrellis.modules.blocks import Blocks
from softtrellis.recipes.ranks import ONE, Ranks


def check_finite(model: nn.Module) -> None:
    """ValueError, naming the tensor, if a weight of the model is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and not all(map(torch.isfinite, parameter.detach().aminmax())):
            raise ValueError(f"{name} holds NaN or infinity; repair the model first")


def check_moment(moment: Tensor, name: str) -> Tensor:
    """The second moment of a layer's inputs; ValueError, naming the layer, if it is not finite."""
    if not bool(torch.isfinite(moment).all()):
        raise ValueError(f"the inputs of {name} hold NaN or infinity on the calibration text")
    return moment


class SecondMoment:
    """Accumulates sum y x^T over pairs of inputs of linear layers, in float32.

    On a GPU that runs the model in bfloat16 the products are of bfloat16 numbers, which is what
    the linear layers multiply there as well; their sums are float32 everywhere.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.count = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Counts inputs [..., in]; ``y`` is ``x`` by default."""
        rows = x.detach().reshape(-1, self.total.shape[0])
        others = rows if y is None else y.detach().reshape(rows.shape)
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            with torch.autocast("cuda", enabled=False):
                rows, others = rows.to(dtype), others.to(dtype)
                self.total += torch.mm(others.T, rows, out_dtype=torch.float32)
        else:
            self.total.addmm_(others.float().T, rows.float())
        self.count += rows.shape[0]

    def add_up(self, ranks: Ranks) -> None:
        """Counts what other ranks saw, too."""
        ranks.sum_([self.total])
        (count,) = ranks.sum(self.count)
        self.count = int(count)

    def mean(self) -> Tensor:
        """float32 [in, in], E[x x^T]."""
        return self.total / max(1, self.count)


@dataclass
class InputMoments:
    """The second moments of one decoder layer's linear layers.

    Attributes:
        wanted: names of the layers whose moments are taken.
        leaders: for every linear layer that ran, the first one that had the same input.
        moments: by leader.
    """

    wanted: frozenset[str]
    leaders: dict[str, str] = field(default_factory=dict)
    moments: dict[str, SecondMoment] = field(default_factory=dict)
    _counters: dict[str, str] = field(default_factory=dict)
    _last: tuple[Tensor, str] | None = None

    def see(self, name: str, x: Tensor) -> None:
        """Counts an input of a linear layer, once for those that follow one another with it."""
        if name not in self.leaders:
            shared = self._last is not None and self._last[0] is x
            self.leaders[name] = self._last[1] if shared and self._last is not None else name
        leader = self.leaders[name]
        if name in self.wanted and self._counters.setdefault(leader, name) == name:
            if leader not in self.moments:
                self.moments[leader] = SecondMoment(x.shape[-1], x.device)
            self.moments[leader].add(x)
        self._last = (x, leader)

    def add_up(self, ranks: Ranks, device: torch.device) -> None:
        """Counts what other ranks saw, too: experts that no token here was routed to, as well."""
        if ranks.size == 1:
            return
        own = {leader: len(moment.total) for leader, moment in self.moments.items()}
        seen, sizes = dict[str, str](), dict[str, int]()
        for leaders, others in ranks.gather((self.leaders, own)):  # in one order on all ranks
            seen |= leaders
            sizes |= others
        self.leaders = seen
        for leader in sizes.keys() - self.moments.keys():
            self.moments[leader] = SecondMoment(sizes[leader], device)
        self.moments = {leader: self.moments[leader] for leader in sizes}
        for moment in self.moments.values():
            moment.add_up(ranks)

    def hessian(self, name: str) -> Tensor | None:
        """float32 [in, in] of a wanted layer's inputs; None if it never ran.

        Raises:
            ValueError: NaN or infinity among the inputs.
        """
        if name not in self.leaders:
            return None
        return check_moment(self.moments[self.leaders[name]].mean(), name)

    def tokens(self, name: str) -> int:
        """Inputs that a layer saw."""
        leader = self.leaders.get(name)
        return self.moments[leader].count if leader in self.moments else 0

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Names with the same inputs together, in the order in which they ran."""
        wanted, found = set(names), dict[str, list[str]]()
        for name, leader in self.leaders.items():
            if name in wanted:
                found.setdefault(leader, []).append(name)
        never_ran = [[name] for name in wanted - self.leaders.keys()]
        return [*found.values(), *sorted(never_ran)]


@torch.no_grad()
def watch_inputs(
    blocks: Blocks,
    index: int,
    states: Tensor,
    linears: dict[str, nn.Linear],
    wanted: Iterable[str],
) -> tuple[InputMoments, Tensor]:
    """Runs a decoder layer that is on the device, and takes the moments of its linears' inputs.

    H = E[x x^T] (QTIP, section 4).

    Args:
        blocks: the model.
        index: of the decoder layer.
        states: [n, ctx, d], what enters it.
        linears: all its linear layers by name.
        wanted: the names of those whose moments are taken.

    Returns:
        The moments, and the layer's output [n, ctx, d].
    """
    found = InputMoments(frozenset(wanted))
    with ExitStack() as stack:
        for name, linear in linears.items():

            def see(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                found.see(name, args[0])

            stack.callback(linear.register_forward_pre_hook(see).remove)
        output = blocks.run_all(index, states)
    return found, output


class _Seen(Exception):
    """Ends a decoder layer's pass once the wanted input is known."""


def _input_of(
    blocks: Blocks,
    index: int,
    states: Tensor,
    layer: nn.Module,
    name: str,
    *,
    advance: bool = False,
) -> Tensor:
    """[..., in], the input of a decoder layer's linear layer on hidden states [b, ctx, d].

    The pass ends there; with ``advance`` it goes on, and its output takes the place of ``states``.
    """
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        if not advance:
            raise _Seen

    handle = layer.get_submodule(name).register_forward_pre_hook(see)
    try:
        output = blocks.run(index, states, layer)
        if advance:
            states.copy_(output)
    except _Seen:
        pass
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def paired_moments(
    blocks: Blocks,
    index: int,
    states: Tensor,
    original: nn.Module,
    original_states: Tensor,
    name: str,
    ranks: Ranks = ONE,
    *,
    advance: bool = False,
) -> tuple[Tensor, Tensor]:
    """Second moments of a linear layer's inputs behind quantized layers, and with the original.

    Args:
        blocks: the model, as far as it is quantized.
        index: of the decoder layer, which is on the device.
        states: [n, ctx, d], what enters it.
        original: the decoder layer as it was.
        original_states: [n, ctx, d], what entered it in the original model.
        name: of the linear layer inside the decoder layer; it has to see every token.
        ranks: each with its own windows of the text, whose moments are added up.
        advance: the original layer's output takes the place of ``original_states``.

    Returns:
        H = E[x' x'^T] and E[x x'^T], float32 [in, in], with x the original inputs and x' those now.
    """
    layer = blocks.layers[index]
    hessian = cross = SecondMoment(0, states.device)
    for now, then in zip(
        states.split(blocks.batch), original_states.split(blocks.batch), strict=True
    ):
        x = _input_of(blocks, index, now, layer, name)
        before = _input_of(blocks, index, then, original, name, advance=advance)
        if not hessian.count:
            hessian, cross = (SecondMoment(x.shape[-1], x.device) for _ in range(2))
        with blocks.precision():
            hessian.add(x)
            cross.add(x, before)
    for moment in (hessian, cross):
        moment.add_up(ranks)
    return hessian.mean(), cross.mean()
