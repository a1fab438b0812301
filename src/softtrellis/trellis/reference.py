"""One recursion over the trellis, for any semiring: the readable reference.

A message has one element per overlap, [B, U]; a step's weights have one per state, [B, S]. The
log semiring gives log Z and marginals (BCJR), the max semiring the best path (Viterbi), and the
expectation semiring the tangents of the exact backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from softtrellis.spec import TrellisSpec

Element = tuple[Tensor, ...]
Weights = Callable[[int], Element]

IMPOSSIBLE = -1e30
"""Logarithm of the weight of what cannot happen; finite, so that no difference is NaN."""


class Semiring(Protocol):
    """What the recursion needs of an algebra; an element is a tuple of tensors of one shape."""

    def times(self, a: Element, b: Element) -> Element:
        """Weight of one thing followed by another."""
        ...

    def sum(self, x: Element, dim: int) -> Element:
        """Weight of a choice between the entries along ``dim``."""
        ...


class LogSemiring:
    """(log weight,): sums over all paths."""

    def times(self, a: Element, b: Element) -> Element:
        return (a[0] + b[0],)

    def sum(self, x: Element, dim: int) -> Element:
        return (torch.logsumexp(x[0], dim),)


class MaxSemiring:
    """(log weight,): the best path only."""

    def times(self, a: Element, b: Element) -> Element:
        return (a[0] + b[0],)

    def sum(self, x: Element, dim: int) -> Element:
        return (x[0].amax(dim),)


class ExpectationSemiring:
    """(log weight, mean of an additive quantity under it)."""

    def times(self, a: Element, b: Element) -> Element:
        return (a[0] + b[0], a[1] + b[1])

    def sum(self, x: Element, dim: int) -> Element:
        share = torch.softmax(x[0], dim)
        return (torch.logsumexp(x[0], dim), (share * x[1]).sum(dim))


class CarryingMaxSemiring:
    """(log weight, an additive quantity along the best path)."""

    def times(self, a: Element, b: Element) -> Element:
        return (a[0] + b[0], a[1] + b[1])

    def sum(self, x: Element, dim: int) -> Element:
        best, place = x[0].max(dim, keepdim=True)
        return (best.squeeze(dim), x[1].gather(dim, place).squeeze(dim))


def by_overlap_in(message: Element, spec: TrellisSpec) -> Element:
    """[B, U] to [B, S]: each state takes the entry of the overlap it comes from."""
    return tuple(m.repeat_interleave(spec.num_branches, dim=1) for m in message)


def by_overlap_out(message: Element, spec: TrellisSpec) -> Element:
    """[B, U] to [B, S]: each state takes the entry of the overlap it leads to."""
    return tuple(m.repeat(1, spec.num_branches) for m in message)


def advance(message: Element, weights: Element, semiring: Semiring, spec: TrellisSpec) -> Element:
    """One forward step: alpha_{t+1} [B, U] from alpha_t [B, U] and the step's weights [B, S]."""
    x = semiring.times(by_overlap_in(message, spec), weights)
    shape = (-1, spec.num_branches, spec.num_overlaps)
    return semiring.sum(tuple(part.reshape(shape) for part in x), 1)


def retreat(message: Element, weights: Element, semiring: Semiring, spec: TrellisSpec) -> Element:
    """One backward step: beta_t [B, U] from beta_{t+1} [B, U] and the step's weights [B, S]."""
    x = semiring.times(weights, by_overlap_out(message, spec))
    shape = (-1, spec.num_overlaps, spec.num_branches)
    return semiring.sum(tuple(part.reshape(shape) for part in x), 2)


def forward_messages(
    start: Element, weights: Weights, steps: int, semiring: Semiring, spec: TrellisSpec
) -> list[Element]:
    """alpha_0 to alpha_N, each [B, U]."""
    messages = [start]
    for t in range(steps):
        messages.append(advance(messages[-1], weights(t), semiring, spec))
    return messages


def backward_messages(
    end: Element, weights: Weights, steps: int, semiring: Semiring, spec: TrellisSpec
) -> Iterator[tuple[int, Element]]:
    """(t, beta_{t+1}) for t from N - 1 down to 0, each message [B, U]."""
    message = end
    for t in reversed(range(steps)):
        yield t, message
        message = retreat(message, weights(t), semiring, spec)


def boundary(w: Tensor, spec: TrellisSpec, pins: Tensor | None) -> Tensor:
    """Log weights [B, U] of the overlaps at both ends: free (0), or one overlap only."""
    message = w.new_zeros(w.shape[0], spec.num_overlaps)
    if pins is not None:
        message.fill_(IMPOSSIBLE).scatter_(1, pins.to(torch.int64).unsqueeze(1), 0.0)
    return message


def log_weights(w_t: Tensor, codebook: Tensor, temperature: Tensor) -> Tensor:
    """log phi_t(s) = -|C[s] - w_t|^2 / T: [B, S] from w_t [B, V], C [S, V] and T [B]."""
    return -(codebook - w_t.unsqueeze(1)).square().sum(-1) / temperature.unsqueeze(1)


def log_partition(
    w: Tensor, codebook: Tensor, spec: TrellisSpec, temperature: Tensor, pins: Tensor | None = None
) -> Tensor:
    """log Z [B] in nats, differentiable: w [B, N, V], C [S, V], T [B], pins int [B] or None."""
    ends = boundary(w, spec, pins)

    def weights(t: int) -> Element:
        return (log_weights(w[:, t], codebook, temperature),)

    alpha = forward_messages((ends,), weights, w.shape[1], LogSemiring(), spec)[-1][0]
    return torch.logsumexp(alpha + ends, 1)


def log_marginals(
    w: Tensor, codebook: Tensor, spec: TrellisSpec, temperature: Tensor, pins: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(t, log P_t [B, S]) for t from N - 1 down to 0; arguments as ``log_partition``."""
    ends, steps, semiring = boundary(w, spec, pins), w.shape[1], LogSemiring()

    def weights(t: int) -> Element:
        return (log_weights(w[:, t], codebook, temperature),)

    alpha = forward_messages((ends,), weights, steps, semiring, spec)
    for t, beta in backward_messages((ends,), weights, steps, semiring, spec):
        (joint,) = semiring.times(
            semiring.times(by_overlap_in(alpha[t], spec), weights(t)), by_overlap_out(beta, spec)
        )
        yield t, torch.log_softmax(joint, 1)
