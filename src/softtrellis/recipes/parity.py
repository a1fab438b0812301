"""Kernels against the float64 reference, on fresh random tiles: what is wrong is not timed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from softtrellis.backend import Backend
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bcjr import bcjr
from softtrellis.trellis.bitshift import check_path, overlap_in
from softtrellis.trellis.reference import (
    Element,
    MaxSemiring,
    boundary,
    forward_messages,
    log_weights,
    retreat,
)
from softtrellis.trellis.validation import Ends
from softtrellis.trellis.viterbi import viterbi

LOW_TEMPERATURE = 0.05
COST_TOLERANCE, PATH_TOLERANCE = 1e-6, 1e-5


def soft_tolerance(temperature: float) -> float:
    """The largest relative error of values, log_z and gradient that counts as right."""
    return 2e-5 if temperature >= LOW_TEMPERATURE else 1e-4


@dataclass(frozen=True)
class Parity:
    """How far a kernel is from the reference.

    Attributes:
        errors: relative errors by name; infinity where something is not finite.
        wrong: what is wrong, in words; None if nothing is.
    """

    errors: dict[str, float]
    wrong: str | None


def fresh_tiles(
    count: int, spec: TrellisSpec, generator: torch.Generator, *, outliers: bool = False
) -> Tensor:
    """float32 [count, N, V], standard normal, on the generator's device.

    With ``outliers`` one value in a hundred is multiplied by 4.
    """
    shape, device = (count, spec.steps(), spec.V), generator.device
    w = torch.randn(shape, generator=generator, device=device)
    if outliers:
        w[torch.rand(shape, generator=generator, device=device) < 0.01] *= 4
    return w


def fresh_pins(count: int, spec: TrellisSpec, generator: torch.Generator) -> Tensor:
    """int64 [count], random overlaps on the generator's device."""
    return torch.randint(spec.num_overlaps, (count,), generator=generator, device=generator.device)


def soft_answers(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: float | Tensor,
    ends: Ends,
    gradient: Tensor | None,
    backend: Backend,
) -> dict[str, Tensor]:
    """What ``bcjr`` says.

    Args:
        w, codebook, spec, temperature, ends, backend: as for ``bcjr``.
        gradient: [B, N, V], the upstream gradient of the values, or None for no backward pass.

    Returns:
        "values" [B, N, V], "log_z" [B] and, with an upstream gradient, "gradient" [B, N, V].
    """
    x = w.detach().requires_grad_(gradient is not None)
    soft = bcjr(x, codebook, spec, temperature=temperature, ends=ends, backend=backend)
    answers = {"values": soft.values.detach(), "log_z": soft.log_z.detach()}
    if gradient is not None:
        (answers["gradient"],) = torch.autograd.grad(soft.values, x, gradient)
    return answers


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills what torch allocates with NaN (integers: their maximum): what stays unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@dataclass(frozen=True)
class _Hidden:
    """A batch with the probes at random places.

    Attributes:
        w, upstream: float32 [B, N, V].
        pins: int64 [B].
        rows: int64 [H], where the probes are.
        which: int64 [H], the probe that is there.
    """

    w: Tensor
    upstream: Tensor
    pins: Tensor
    rows: Tensor
    which: Tensor


@dataclass(eq=False)
class Referee:
    """A few tiles of one trellis, the probes, with the reference's answers for them.

    Every check hides the probes among fresh tiles in a batch of the size that is to be timed, so
    that the launch which is judged is the one which is timed. The first half of the probes has
    free ends, the other half pinned ones.

    Args:
        spec: the trellis.
        codebook: float32 [S, V], on the device under test.
        generator: of everything random, on the same device.
        probes: how many tiles, at least 2.
        gradients: whether gradients will be asked for; the reference takes long for them.
        temperatures: which will be asked for; the reference answers them together.
    """

    spec: TrellisSpec
    codebook: Tensor
    generator: torch.Generator
    probes: int
    gradients: bool = True
    temperatures: tuple[float, ...] = ()
    _answers: dict[tuple[float, bool], dict[str, Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.probes < 2:
            raise ValueError(f"probes must be at least 2, got {self.probes}")
        self._w = fresh_tiles(self.probes, self.spec, self.generator, outliers=True)
        self._upstream = fresh_tiles(self.probes, self.spec, self.generator)
        self._pins = fresh_pins(self.probes, self.spec, self.generator)
        self._table = self.codebook.double()

    def soft(self, temperature: float, tiles: int, backend: Backend, *, gradient: bool) -> Parity:
        """Judges ``bcjr`` in a batch of so many tiles, with free and with pinned ends.

        An error is the largest norm of a tile's difference over the root mean square of the
        norms of the probes' exact answers. The norm of log_z counts as one nat per step at least:
        near some temperature its sign changes.
        """
        errors: dict[str, float] = {}
        for pinned in (False, True):
            exact = self._exact(temperature, pinned)
            batch = self._hide(tiles, self._part(pinned))
            upstream = batch.upstream if gradient else None
            ends: Ends = batch.pins if pinned else "free"
            with poisoned():
                found = soft_answers(
                    batch.w, self.codebook, self.spec, temperature, ends, upstream, backend
                )
            for name, x in found.items():
                least = float(self.spec.steps()) if name == "log_z" else 0.0
                error = _relative(x, exact[name], batch, least)
                errors[name] = max(errors.get(name, 0.0), error)
        return _judge(errors, dict.fromkeys(errors, soft_tolerance(temperature)))

    def hard(self, ends: str, tiles: int, backend: Backend) -> Parity:
        """Judges ``viterbi`` in a batch of so many tiles.

        The states must be a path with the ends asked for; the values its codewords; "cost" its
        exact cost; "excess" is what the best path with the same ends costs less; and "seam", for
        tail-biting paths, what the best path of the rolled tile costs less than the best one that
        passes through the seam.

        Args:
            ends: "free", "pinned" or "tail_biting".
            tiles: B.
            backend: as for ``viterbi``.
        """
        spec, batch = self.spec, self._hide(tiles, slice(None))
        given: Ends = batch.pins if ends == "pinned" else "free"
        with poisoned():
            path = viterbi(
                batch.w,
                self.codebook,
                spec,
                ends="tail_biting" if ends == "tail_biting" else given,
                backend=backend,
            )
        try:
            check_path(path.states, spec, tail_biting=ends != "free")
        except ValueError as error:
            return Parity({}, str(error))
        if ends == "pinned" and not torch.equal(
            overlap_in(path.states[:, 0], spec).long(), batch.pins
        ):
            return Parity({}, "paths do not start where they are pinned")
        states, exact = path.states.long(), self._w.double()[batch.which]
        cost = (self._table[states[batch.rows]] - exact).square().sum((1, 2))
        start = overlap_in(states[batch.rows, 0], spec)
        errors = {
            "values": _largest((path.values - self.codebook[states]).abs()),
            "cost": _largest((path.cost[batch.rows] - cost).abs() / cost),
        }
        if not bool(torch.isfinite(path.cost).all()):
            errors["cost"] = math.inf
        tolerances = {"values": 0.0, "cost": COST_TOLERANCE, "seam": PATH_TOLERANCE}
        if ends == "tail_biting":
            through = self._through_seam
            least = through.amin(1)[batch.which]
            errors["seam"] = _largest(through[batch.which, start] / least - 1)
            judged = _judge(errors, tolerances)
            if judged.wrong is not None:  # many seams would take the reference long
                return judged
        best = self._least_cost(batch.which, None if ends == "free" else start)
        errors["excess"] = _largest(cost / best - 1)
        return _judge(errors, {**tolerances, "excess": PATH_TOLERANCE})

    def _part(self, pinned: bool) -> slice:
        middle = (self.probes + 1) // 2
        return slice(middle, None) if pinned else slice(middle)

    def _hide(self, tiles: int, part: slice) -> _Hidden:
        """Probes in about half of the rows, at least one."""
        spec, generator = self.spec, self.generator
        device = generator.device
        w = fresh_tiles(tiles, spec, generator, outliers=True)
        upstream = fresh_tiles(tiles, spec, generator)
        pins = fresh_pins(tiles, spec, generator)
        chance = torch.rand(tiles, generator=generator, device=device)
        rows = (chance <= chance.amin().clamp_min(0.5)).nonzero().squeeze(1)
        count = len(self._w[part])
        which = torch.randint(count, rows.shape, generator=generator, device=device)
        w[rows] = self._w[part][which]
        upstream[rows] = self._upstream[part][which]
        pins[rows] = self._pins[part][which]
        return _Hidden(w, upstream, pins, rows, which)

    def _exact(self, temperature: float, pinned: bool) -> dict[str, Tensor]:
        if (temperature, pinned) not in self._answers:
            asked = dict.fromkeys((temperature, *self.temperatures))
            self._answer([T for T in asked if (T, pinned) not in self._answers], pinned)
        return self._answers[temperature, pinned]

    def _answer(self, temperatures: list[float], pinned: bool) -> None:
        """Asks the reference for all these temperatures in one batch."""
        part, count = self._part(pinned), len(temperatures)
        w, pins = self._w[part].double(), self._pins[part]
        upstream = self._upstream[part].double().repeat(count, 1, 1) if self.gradients else None
        answers = soft_answers(
            w.repeat(count, 1, 1),
            self._table,
            self.spec,
            w.new_tensor(temperatures).repeat_interleave(len(w)),
            pins.repeat(count) if pinned else "free",
            upstream,
            "torch",
        )
        for i, T in enumerate(temperatures):
            rows = slice(i * len(w), (i + 1) * len(w))
            self._answers[T, pinned] = {name: x[rows] for name, x in answers.items()}

    @cached_property
    def _through_seam(self) -> Tensor:
        """[P, U], least cost of the probes, rolled by half, through each overlap at the seam."""
        spec, steps = self.spec, self.spec.steps()
        seam = steps - steps // 2
        x = self._w.double().roll(seam, dims=1)
        one, free = x.new_ones(len(x)), (boundary(x, spec, None),)

        def weights(t: int) -> Element:
            return (log_weights(x[:, t], self._table, one),)

        alpha = forward_messages(free, weights, seam, MaxSemiring(), spec)[-1]
        beta: Element = free
        for t in reversed(range(seam, steps)):
            beta = retreat(beta, weights(t), MaxSemiring(), spec)
        return -(alpha[0] + beta[0])

    def _least_cost(self, which: Tensor, start: Tensor | None) -> Tensor:
        """[H], what the best path of each probe costs, with the ends given."""
        ends = torch.full_like(which, -1) if start is None else start
        pairs, back = torch.unique(torch.stack((which, ends), 1), dim=0, return_inverse=True)
        path = viterbi(
            self._w.double()[pairs[:, 0]],
            self._table,
            self.spec,
            ends="free" if start is None else pairs[:, 1],
            backend="torch",
        )
        return path.cost[back]


def _largest(x: Tensor) -> float:
    found = float(x.amax())
    return found if math.isfinite(found) else math.inf


def _relative(found: Tensor, exact: Tensor, batch: _Hidden, least: float) -> float:
    if not bool(torch.isfinite(found).all()):
        return math.inf
    difference = (found[batch.rows].double() - exact[batch.which]).reshape(len(batch.rows), -1)
    sizes = exact.reshape(len(exact), -1).norm(dim=1)
    size = sizes.square().mean().sqrt().clamp_min(max(least, torch.finfo(exact.dtype).tiny))
    return _largest(difference.norm(dim=1) / size)


def short(x: float) -> str:
    """A small number in two digits: 3.1e-4."""
    mantissa, _, exponent = f"{x:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _judge(errors: dict[str, float], tolerances: dict[str, float]) -> Parity:
    for name, error in errors.items():
        if not math.isfinite(error):
            return Parity(errors, f"{name} not finite")
        if error > tolerances[name]:
            return Parity(errors, f"{name} {short(error)} > {short(tolerances[name])}")
    return Parity(errors, None)
