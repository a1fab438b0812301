"""Soft trellis quantization: the Boltzmann expectation over all paths, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softtrellis.backend import Backend
from softtrellis.spec import TrellisSpec
from softtrellis.trellis import bcjr_ops  # noqa: F401  registers the operators
from softtrellis.trellis.reference import log_marginals
from softtrellis.trellis.validation import (
    EXACT_OVERLAPS,
    Ends,
    check_problem,
    resolve_pins,
    values_are_readable,
)

FLOAT32_TEMPERATURES = (0.005, 1e6)
"""The temperatures at which float32 sweeps keep their stated accuracy."""


@dataclass(frozen=True, eq=False)
class SoftPath:
    """The Boltzmann average over all paths of each tile.

    Attributes:
        values: [B, N, V], the soft codewords; differentiable.
        log_z: [B], the natural logarithm of the partition function, not normalised by the number
            of paths; differentiable.
        entropy: [B, N] in nats over states, where it was asked for; not differentiable.
    """

    values: Tensor
    log_z: Tensor
    entropy: Tensor | None = None


def _soft(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    pins: Tensor | None,
    with_entropy: bool,
    backend: Backend,
) -> SoftPath:
    values, log_z, entropy = torch.ops.softtrellis.soft_forward(
        w, codebook, temperature, pins, spec.L, spec.k, spec.V, with_entropy, backend
    )
    return SoftPath(values, log_z, entropy if with_entropy else None)


def bcjr(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    *,
    temperature: float | Tensor,
    ends: Ends = "free",
    return_entropy: bool = False,
    backend: Backend = "auto",
) -> SoftPath:
    """The soft codeword (BCJR-QAT, arXiv 2605.10655, section 3) with its exact gradient.

    A path has the energy |codebook[states] - w|^2, summed over steps and components, and the
    weight exp(-energy / T). The gradients with respect to ``w`` and, where it requires one, to
    ``codebook`` are exact and can be had once (no second derivatives); the temperature has none.

    Runs under ``torch.compile``, and inside a CUDA graph once it has run before it. Tensors' values
    (finite weights, temperatures and overlaps in range) are checked, which waits for a GPU, except
    while ``torch.compile`` traces or a CUDA graph is captured: then the caller answers for them.

    Args:
        w: float32 or float64 [B, N, V].
        codebook: float [2**L, V].
        spec: the trellis.
        temperature: T > 0, in w's squared units; a number or a tensor, [] or [B]. "cpu" and
            "triton" take 0.005 to 1e6, "torch" takes any.
        ends: "free", an int tensor [B] of overlaps in [0, U) to which both ends are pinned, or
            "tail_biting": the exact trace over all overlaps, for at most 256 of them.
        return_entropy: also return the entropy of every step's marginal.
        backend: "auto", "torch", "cpu", "triton" or "cuda"; see ``resolve_backend``.

    Returns:
        SoftPath.

    Raises:
        ValueError: shapes, values or a temperature that do not fit, or ends without a path.
        RuntimeError: a backend that is not installed.
        torch.OutOfMemoryError: the device cannot hold one tile's messages; more tiles than it
            can hold are taken in parts (``trellis.memory``).
    """
    check_problem(w, codebook, spec)
    if isinstance(ends, str) and ends == "tail_biting_exact":
        raise ValueError("bcjr's exact tail-biting answer is ends='tail_biting'")
    pins = resolve_pins(ends, w, spec)
    temperatures = _temperatures(temperature, w, backend)
    table = codebook.to(w.dtype)
    if isinstance(ends, str) and ends == "tail_biting":
        return _exact_tail_biting(w, table, spec, temperatures, return_entropy, backend)
    return _soft(w, table, spec, temperatures, pins, return_entropy, backend)


def pass_back(
    values: Tensor,
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    *,
    temperature: float | Tensor,
    ends: Literal["free"] | Tensor = "free",
    backend: Backend = "auto",
) -> Tensor:
    """Values with the gradient of the Boltzmann average, which is not computed.

    The gradient needs the average only as a centre, for which any values near it do: straight
    through the hard code it costs a backward pass alone.

    Args:
        values: [B, N, V] like ``w``, near ``bcjr(w, ...).values``, such as the hard codewords; they
            get no gradient.
        w, codebook, spec, temperature, backend: as in ``bcjr``.
        ends: as there, "free" or overlaps.

    Returns:
        The values. Gradients with respect to ``w`` and ``codebook`` are those that
        ``bcjr(w, ...).values`` has, to rounding, and can be had once.

    Raises:
        ValueError: shapes, values or a temperature that do not fit, or other ends.
        RuntimeError: a backend that is not installed.
        torch.OutOfMemoryError: as ``bcjr``, in the backward pass.
    """
    check_problem(w, codebook, spec)
    if values.shape != w.shape or values.device != w.device:
        raise ValueError(
            f"values must be {list(w.shape)} on {w.device} like w, "
            f"got {list(values.shape)} on {values.device}"
        )
    if isinstance(ends, str) and ends != "free":
        raise ValueError(f"pass_back takes ends 'free' or overlaps, got {ends!r}")
    pins = resolve_pins(ends, w, spec)
    temperatures = _temperatures(temperature, w, backend)
    centre, table = values.detach().to(w.dtype), codebook.to(w.dtype)
    found: Tensor = torch.ops.softtrellis.pass_back(
        centre, w, table, temperatures, pins, spec.L, spec.k, spec.V, backend
    )
    return found


def _temperatures(temperature: float | Tensor, w: Tensor, backend: Backend) -> Tensor:
    """[B], checked; a number is checked and spread out without waiting for w's device."""
    exact = backend == "torch" or w.dtype == torch.float64
    if not isinstance(temperature, Tensor):
        _check_temperatures(temperature, temperature, w.dtype, exact)
        return torch.full((w.shape[0],), temperature, dtype=w.dtype, device=w.device)
    value = temperature.detach().to(w)
    if value.ndim == 0:
        value = value.expand(w.shape[0])
    if tuple(value.shape) != (w.shape[0],):
        raise ValueError(
            f"temperature must be a number or a tensor [B={w.shape[0]}], got {list(value.shape)}"
        )
    if value.numel() and values_are_readable(value):
        least, most = torch.stack(value.aminmax()).tolist()
        _check_temperatures(least, most, w.dtype, exact)
    return value.contiguous()


def _check_temperatures(least: float, most: float, dtype: torch.dtype, exact: bool) -> None:
    limits = torch.finfo(dtype)
    if not limits.tiny <= least <= most <= limits.max:
        raise ValueError("temperature must be positive and finite; for T = 0 use viterbi")
    low, high = FLOAT32_TEMPERATURES
    if not exact and not low * (1 - 1e-6) <= least <= most <= high:
        raise ValueError(
            f"this backend takes temperatures from {low} to {high:g}; use viterbi for T = 0, "
            "or backend='torch'"
        )


def _exact_tail_biting(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    return_entropy: bool,
    backend: Backend,
) -> SoftPath:
    """The average over all overlaps u, each pinned at u and weighted by its own Z."""
    if spec.num_overlaps > EXACT_OVERLAPS:
        raise ValueError(
            f"bcjr(ends='tail_biting') takes at most {EXACT_OVERLAPS} overlaps, this trellis has "
            f"{spec.num_overlaps}; pin both ends to a tail-biting path instead: "
            "ends=path.states[:, 0] >> (k*V)"
        )
    pins = [torch.full_like(w[:, 0, 0], u, dtype=torch.int64) for u in range(spec.num_overlaps)]
    soft = [_soft(w, codebook, spec, temperature, pin, False, backend) for pin in pins]
    all_log_z = torch.stack([each.log_z for each in soft])
    share = torch.softmax(all_log_z, 0)
    mean = (share[:, :, None, None] * torch.stack([each.values for each in soft])).sum(0)
    entropy = None
    if return_entropy:
        entropy = _mixture_entropy(w, codebook, spec, temperature, pins, share)
    return SoftPath(mean, torch.logsumexp(all_log_z, 0), entropy)


@torch.no_grad()
def _mixture_entropy(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    pins: list[Tensor],
    share: Tensor,
) -> Tensor:
    p = w.new_zeros(w.shape[0], w.shape[1], spec.num_states)
    for u, pin in enumerate(pins):
        for t, log_p in log_marginals(w, codebook, spec, temperature, pin):
            p[:, t] += share[u].unsqueeze(1) * log_p.exp()
    entropy: Tensor = -torch.special.xlogy(p, p).sum(2)
    return entropy
