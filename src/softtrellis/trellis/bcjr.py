"""Soft trellis quantization: the Boltzmann expectation over all paths, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from softtrellis.backend import Backend, ResolvedBackend, resolve_backend
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.reference import log_marginals
from softtrellis.trellis.validation import EXACT_OVERLAPS, Ends, check_problem, resolve_pins

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


def _implementation(backend: ResolvedBackend) -> ModuleType:
    if backend == "cpu":
        from softtrellis.trellis import bcjr_cpu

        return bcjr_cpu
    if backend == "triton":
        from softtrellis.trellis import bcjr_triton

        return bcjr_triton
    from softtrellis.trellis import bcjr_torch

    return bcjr_torch


class _SoftCodeword(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        codebook: Tensor,
        temperature: Tensor,
        pins: Tensor | None,
        spec: TrellisSpec,
        with_entropy: bool,
        backend: ResolvedBackend,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        values, log_z, entropy = _implementation(backend).soft_forward(
            w, codebook, spec, temperature, pins, with_entropy
        )
        ctx.save_for_backward(w, codebook, temperature, pins, values)
        ctx.spec, ctx.backend = spec, backend
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return values, log_z, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_values: Tensor, grad_log_z: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        w, codebook, temperature, pins, values = ctx.saved_tensors
        grad_w, grad_codebook = _implementation(ctx.backend).soft_backward(
            w,
            codebook,
            ctx.spec,
            temperature,
            pins,
            values,
            grad_values.contiguous(),
            grad_log_z.contiguous(),
            ctx.needs_input_grad[1],
        )
        return grad_w, grad_codebook, None, None, None, None, None


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
    ``codebook`` are exact; the temperature has none.

    Args:
        w: float32 or float64 [B, N, V].
        codebook: float [2**L, V].
        spec: the trellis.
        temperature: T > 0, in w's squared units; a number or a tensor [B]. "cpu" and "triton" take
            0.005 to 1e6, "torch" takes any.
        ends: "free", an int tensor [B] of overlaps in [0, U) to which both ends are pinned, or
            "tail_biting": the exact trace over all overlaps, for at most 256 of them.
        return_entropy: also return the entropy of every step's marginal.
        backend: "auto", "torch", "cpu" or "triton"; see ``resolve_backend``.

    Returns:
        SoftPath.

    Raises:
        ValueError: shapes, values or a temperature that do not fit, or ends without a path.
        RuntimeError: a backend that is not installed.
    """
    check_problem(w, codebook, spec)
    if isinstance(ends, str) and ends == "tail_biting_exact":
        raise ValueError("bcjr's exact tail-biting answer is ends='tail_biting'")
    pins = resolve_pins(ends, w, spec)
    resolved = resolve_backend(backend, w)
    temperatures = _temperatures(temperature, w, exact=resolved == "torch")
    table = codebook.to(w.dtype)
    if isinstance(ends, str) and ends == "tail_biting":
        return _exact_tail_biting(w, table, spec, temperatures, return_entropy, resolved)
    values, log_z, entropy = _SoftCodeword.apply(  # type: ignore[no-untyped-call]
        w, table, temperatures, pins, spec, return_entropy, resolved
    )
    return SoftPath(values, log_z, entropy)


def _temperatures(temperature: float | Tensor, w: Tensor, *, exact: bool) -> Tensor:
    value = torch.as_tensor(temperature, dtype=w.dtype, device=w.device).detach()
    if value.ndim == 0:
        value = value.expand(w.shape[0])
    if tuple(value.shape) != (w.shape[0],):
        raise ValueError(
            f"temperature must be a number or a tensor [B={w.shape[0]}], got {list(value.shape)}"
        )
    if not bool((torch.isfinite(value) & (value > 0)).all()):
        raise ValueError("temperature must be positive and finite; for T = 0 use viterbi")
    low, high = FLOAT32_TEMPERATURES
    if not exact and not bool(((value >= low * (1 - 1e-6)) & (value <= high)).all()):
        raise ValueError(
            f"this backend takes temperatures from {low} to {high:g}; use viterbi for T = 0, "
            "or backend='torch'"
        )
    return value.contiguous()


def _exact_tail_biting(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    return_entropy: bool,
    backend: ResolvedBackend,
) -> SoftPath:
    """The average over all overlaps u, each pinned at u and weighted by its own Z."""
    if spec.num_overlaps > EXACT_OVERLAPS:
        raise ValueError(
            f"bcjr(ends='tail_biting') takes at most {EXACT_OVERLAPS} overlaps, this trellis has "
            f"{spec.num_overlaps}; pin both ends to a tail-biting path instead: "
            "ends=path.states[:, 0] >> (k*V)"
        )
    values, log_z = [], []
    pins = [torch.full_like(w[:, 0, 0], u, dtype=torch.int64) for u in range(spec.num_overlaps)]
    for pin in pins:
        soft = _SoftCodeword.apply(  # type: ignore[no-untyped-call]
            w, codebook, temperature, pin, spec, False, backend
        )
        values.append(soft[0])
        log_z.append(soft[1])
    all_log_z = torch.stack(log_z)
    share = torch.softmax(all_log_z, 0)
    mean = (share[:, :, None, None] * torch.stack(values)).sum(0)
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
