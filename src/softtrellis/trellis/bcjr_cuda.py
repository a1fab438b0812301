"""BCJR in CUDA C++ for k = 2: ``cuda/bcjr_hyb.cu`` and ``cuda/bcjr_scalar.cu`` at L = 16,
``cuda/bcjr_short.cu`` for HYB at L = 12.

The CUDA kernels carry linear messages and certify every tile (``cuda/messages.cuh``). What they do
not certify, and what they are not made for, goes to the log-domain kernels of ``bcjr_triton``:
other trellises, V = 2 codebooks without HYB's symmetries, V = 1 codebooks that are not float16
numbers times a factor, entropies and the gradient of the codebook.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softtrellis.codes.hybrid import TABLE_ROWS
from softtrellis.spec import TrellisSpec
from softtrellis.trellis import bcjr_triton
from softtrellis.trellis.codebook_cuda import (
    scaled_halves,
    short_states_of_rows,
    states_of_rows,
)
from softtrellis.trellis.launch_cuda import Kernel, multiprocessors

HYB_SPEC, SCALAR_SPEC = TrellisSpec(16, 2, 2), TrellisSpec(16, 2, 1)
SHORT_SPEC = TrellisSpec(12, 2, 2)
MOST_STEPS = 256
"""The certificate's bound is made for this many."""

_LOG2E = 1.0 / math.log(2.0)
_HYB = {
    tangent: Kernel("bcjr_hyb.cu", name, 512)
    for tangent, name in enumerate(("forward", "backward"))
}
_SCALAR = {
    tangent: Kernel("bcjr_scalar.cu", name, 512)
    for tangent, name in enumerate(("forward", "backward"))
}
_SHORT = {
    tangent: Kernel("bcjr_short.cu", name, 256)
    for tangent, name in enumerate(("forward", "backward"))
}
_HYB_GROUPS = 2
_SHORT_TEAMS, _SHORT_TILES = 8, 4


def _runs(spec: TrellisSpec, steps: int) -> bool:
    """Whether there is a CUDA kernel for this trellis."""
    if steps > MOST_STEPS:
        return False
    return spec in (HYB_SPEC, SHORT_SPEC) or (spec == SCALAR_SPEC and steps % 2 == 0)


def _start(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    pins: Tensor | None,
    outputs: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Starts the kernel; outputs are values, log_z, grad_values, grad_log_z and grad_w.

    Returns:
        int32 [B], whose first entries are the tiles that were not certified, and their number,
        int32 [].
    """
    batch, steps, _ = w.shape
    device, tangent = w.device, outputs[2] is not None
    fields = 2 if tangent else 1
    scales = (_LOG2E / temperature.double()).sqrt().float()
    failed = torch.arange(batch, dtype=torch.int32, device=device)
    following, failures = torch.zeros(2, dtype=torch.int32, device=device)
    if spec == HYB_SPEC:
        blocks = min(multiprocessors(device), -(-batch // _HYB_GROUPS))
        floats = blocks * _HYB_GROUPS * steps * (spec.num_overlaps * fields + 32)
        group = spec.num_overlaps * 4 * fields + 128 + steps * 48
        shared = spec.num_states // 4 * 8 + 512 * 8 + 128 + _HYB_GROUPS * group
        tables = [codebook, states_of_rows(device)]
        kernel = _HYB[tangent]
    elif spec == SHORT_SPEC:
        blocks = min(multiprocessors(device), -(-batch // _SHORT_TILES))
        message = spec.num_overlaps * fields * _SHORT_TILES
        row = message + 2 * _SHORT_TILES
        floats = blocks * (2 * TABLE_ROWS + _SHORT_TEAMS * steps * row)
        kernel = _SHORT[tangent]
        team = (2 * TABLE_ROWS * _SHORT_TILES + message) * 4 + 112
        shared = _SHORT_TEAMS * team + spec.num_states * 8
        tables = [codebook, short_states_of_rows(device)]
    else:
        blocks = min(multiprocessors(device), batch)
        floats = blocks * (steps // 2 * spec.num_overlaps * fields + steps * 64)
        states = spec.num_states // 8 * 5 if tangent else spec.num_states
        shared = spec.num_overlaps * 4 * fields + 6 * 64 + 32 + steps * 48 + states * 2
        tables = [*scaled_halves(codebook), torch.stack(codebook.aminmax())]
        kernel = _SCALAR[tangent]
    scratch = torch.empty(floats, dtype=torch.float32, device=device)
    addresses = [w, *tables, scales, pins, *outputs, scratch, following, failed, failures]
    kernel(blocks, shared, device, addresses, [batch, steps])
    return failed, failures


def soft_forward(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    temperature: Tensor,
    pins: Tensor | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The soft codeword; ``bcjr_torch.soft_forward`` on an NVIDIA GPU.

    Args:
        w: float32 [B, N, V].
        codebook: float32 [S, V].
        spec: the trellis.
        temperature: float32 [B].
        pins: int64 [B], the overlap at both ends, or None for free ends.
        with_entropy: also return the entropies of the marginals.

    Returns:
        values [B, N, V], log_z [B] in nats, entropy [B, N] in nats over states or None.
    """
    batch, steps, _ = w.shape
    if with_entropy or batch == 0 or not _runs(spec, steps):
        return bcjr_triton.soft_forward(w, codebook, spec, temperature, pins, with_entropy)
    values = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    log_z = torch.empty(batch, dtype=torch.float32, device=w.device)
    left = _start(w, codebook, spec, temperature, pins, [values, log_z, None, None, None])
    bcjr_triton.sweep(w, codebook, spec, temperature, pins, values, log_z=log_z, chosen=left)
    return values, log_z, None


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
    """The exact gradient of ``soft_forward``; ``bcjr_torch.soft_backward`` on an NVIDIA GPU.

    Args:
        w, codebook, spec, temperature, pins: as in ``soft_forward``.
        values: [B, N, V], what ``soft_forward`` returned; without ``grad_log_z`` anything near it.
        grad_values: [B, N, V], upstream gradient g.
        grad_log_z: [B], upstream gradient of log Z; None is none.
        with_codebook: also return the gradient with respect to the codebook.

    Returns:
        grad_w [B, N, V], grad_codebook [S, V] or None.
    """
    batch, steps, _ = w.shape
    values, grad_values = values.contiguous(), grad_values.contiguous()
    grad_log_z = None if grad_log_z is None else grad_log_z.contiguous()
    if with_codebook or batch == 0 or not _runs(spec, steps):
        return bcjr_triton.soft_backward(
            w, codebook, spec, temperature, pins, values, grad_values, grad_log_z, with_codebook
        )
    grad_w = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    outputs = [values, None, grad_values, grad_log_z, grad_w]
    left = _start(w, codebook, spec, temperature, pins, outputs)
    bcjr_triton.sweep(
        w,
        codebook,
        spec,
        temperature,
        pins,
        values,
        grad_values=grad_values,
        grad_log_z=grad_log_z,
        grad_w=grad_w,
        chosen=left,
    )
    return grad_w, None
