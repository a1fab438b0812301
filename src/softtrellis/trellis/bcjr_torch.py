"""BCJR in plain PyTorch: two sweeps forward, two more for the exact backward pass.

Nothing of size S x N is stored, and tiles are taken in chunks, so that memory does not grow with
their number beyond inputs and outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softtrellis.spec import TrellisSpec
from softtrellis.trellis.reference import (
    Element,
    ExpectationSemiring,
    LogSemiring,
    backward_messages,
    boundary,
    by_overlap_in,
    by_overlap_out,
    forward_messages,
    log_weights,
)

_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}


def _chunk(w: Tensor, spec: TrellisSpec) -> int:
    per_tile = max(spec.num_states * spec.V, 2 * (w.shape[1] + 1) * spec.num_overlaps)
    return max(1, _CHUNK_ELEMENTS["cuda" if w.is_cuda else "cpu"] // per_tile)


def soft_forward(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    pins: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The soft codeword (BCJR-QAT, section 3): the Boltzmann expectation over all paths.

    Args:
        w: float [B, N, V].
        codebook: float [S, V].
        spec: the trellis.
        temperature: float [B].
        pins: int64 [B], the overlap at both ends, or None for free ends.
        with_entropy: also return the entropies of the marginals.

    Returns:
        values [B, N, V], log_z [B] in nats, entropy [B, N] in nats over states or None.
    """
    values = torch.empty_like(w)
    log_z = w.new_empty(w.shape[0])
    entropy = w.new_empty(w.shape[:2]) if with_entropy else None
    size = _chunk(w, spec)
    for first in range(0, w.shape[0], size):
        part = slice(first, first + size)
        x, ends = w[part], boundary(w[part], spec, None if pins is None else pins[part])

        def weights(t: int, x: Tensor = x, part: slice = part) -> Element:
            return (log_weights(x[:, t], codebook, temperature[part]),)

        semiring, steps = LogSemiring(), x.shape[1]
        alpha = forward_messages((ends,), weights, steps, semiring, spec)
        log_z[part] = torch.logsumexp(alpha[-1][0] + ends, 1)
        for t, beta in backward_messages((ends,), weights, steps, semiring, spec):
            into = semiring.times(by_overlap_in(alpha[t], spec), weights(t))
            (joint,) = semiring.times(into, by_overlap_out(beta, spec))
            log_p = torch.log_softmax(joint, 1)
            p = log_p.exp()
            values[part, t] = p @ codebook
            if entropy is not None:
                entropy[part, t] = -(p * log_p).sum(1)
    return values, log_z, entropy


def soft_backward(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    pins: Tensor | None,
    values: Tensor,
    grad_values: Tensor,
    grad_log_z: Tensor | None,
    with_codebook: bool,
) -> tuple[Tensor, Tensor | None]:
    """The exact gradient of ``soft_forward``, by sweeps over the expectation semiring.

    With G = sum_u g_u . (C[s_u] - values_u) along a path, the gradient with respect to w_t is
    (2 / T) E[C[s_t] (G - E[G])]: every message carries the mean of the part of G it has seen. That
    holds for any values; near the average the terms of G are small.

    Args:
        w, codebook, spec, temperature, pins: as in ``soft_forward``.
        values: [B, N, V], what ``soft_forward`` returned; without ``grad_log_z`` anything near it,
            such as the hard code.
        grad_values: [B, N, V], upstream gradient g.
        grad_log_z: [B], upstream gradient of log Z; None is none.
        with_codebook: also return the gradient with respect to the codebook.

    Returns:
        grad_w [B, N, V], grad_codebook [S, V] or None.
    """
    grad_w = torch.empty_like(w)
    grad_codebook = torch.zeros_like(codebook) if with_codebook else None
    size = _chunk(w, spec)
    for first in range(0, w.shape[0], size):
        part = slice(first, first + size)
        x, soft, g = w[part], values[part], grad_values[part]
        T = temperature[part]
        ends = boundary(x, spec, None if pins is None else pins[part])
        nothing = torch.zeros_like(ends)

        def weights(
            t: int, x: Tensor = x, soft: Tensor = soft, g: Tensor = g, T: Tensor = T
        ) -> Element:
            gain = g[:, t] @ codebook.T - (g[:, t] * soft[:, t]).sum(1, keepdim=True)
            return (log_weights(x[:, t], codebook, T), gain)

        semiring, steps = ExpectationSemiring(), x.shape[1]
        alpha = forward_messages((ends, nothing), weights, steps, semiring, spec)
        for t, beta in backward_messages((ends, nothing), weights, steps, semiring, spec):
            into = semiring.times(by_overlap_in(alpha[t], spec), weights(t))
            joint, total = semiring.times(into, by_overlap_out(beta, spec))
            p = torch.softmax(joint, 1)
            scale = (2.0 / T).unsqueeze(1)
            total = total - (p * total).sum(1, keepdim=True)
            grad_w[part, t] = scale * ((p * total) @ codebook)
            if grad_log_z is not None:
                total = total + grad_log_z[part].unsqueeze(1)
                grad_w[part, t] += scale * grad_log_z[part].unsqueeze(1) * (soft[:, t] - x[:, t])
            if grad_codebook is not None:
                mass = scale * p * total
                grad_codebook += p.T @ g[:, t] + mass.T @ x[:, t]
                grad_codebook -= mass.sum(0).unsqueeze(1) * codebook
    return grad_w, grad_codebook
