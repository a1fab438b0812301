"""Hard trellis quantization: the best path by the Viterbi algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softtrellis.backend import Backend, resolve_backend
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.dispatch import implementation
from softtrellis.trellis.memory import VITERBI
from softtrellis.trellis.tail_biting import two_passes
from softtrellis.trellis.validation import EXACT_OVERLAPS, Ends, check_problem, resolve_pins


@dataclass(frozen=True, eq=False)
class Path:
    """A path for each tile.

    Attributes:
        states: int32 [B, N].
        values: [B, N, V], ``codebook[states]``, in the dtype of the weights.
        cost: [B], the squared error summed over the tile.
    """

    states: Tensor
    values: Tensor
    cost: Tensor


torch.library.define(
    "softtrellis::best_path",
    "(Tensor w, Tensor codebook, Tensor? pins, bool tail_biting, int L, int k, int V, str backend) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("softtrellis::best_path", "default")
def _best_path_op(
    w: Tensor,
    codebook: Tensor,
    pins: Tensor | None,
    tail_biting: bool,
    L: int,
    k: int,
    V: int,
    backend: Backend,
) -> Tensor:
    resolved = resolve_backend(backend, w)
    module, spec = implementation("viterbi", resolved), TrellisSpec(L, k, V)
    w, codebook = w.contiguous(), codebook.contiguous()

    def path(part: slice) -> tuple[Tensor]:
        x = w[part]
        if not tail_biting:
            return (module.best_path(x, codebook, spec, None if pins is None else pins[part]),)
        if resolved == "cuda":
            return (module.tail_biting_path(x, codebook, spec),)
        return (two_passes(x, spec, lambda y, seam: module.best_path(y, codebook, spec, seam)),)

    states = [part for (part,) in VITERBI.run(path, w, spec)]
    return states[0] if len(states) == 1 else torch.cat(states)


def _best_path_shape(
    w: Tensor,
    codebook: Tensor,
    pins: Tensor | None,
    tail_biting: bool,
    L: int,
    k: int,
    V: int,
    backend: Backend,
) -> Tensor:
    return w.new_empty(w.shape[:2], dtype=torch.int32)


torch.library.register_fake("softtrellis::best_path", _best_path_shape)


def _best_path(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    pins: Tensor | None,
    backend: Backend,
    *,
    tail_biting: bool = False,
) -> Tensor:
    states: Tensor = torch.ops.softtrellis.best_path(
        w, codebook, pins, tail_biting, spec.L, spec.k, spec.V, backend
    )
    return states


def viterbi(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    *,
    ends: Ends = "tail_biting",
    backend: Backend = "auto",
) -> Path:
    """The path through the trellis of least squared error (QTIP, section 3.1 and algorithm 4).

    Runs under ``torch.compile``, and inside a CUDA graph once it has run before it; tensors' values
    are checked, except then, as in ``bcjr``.

    Args:
        w: float32 or float64 [B, N, V], the weights of B tiles.
        codebook: float [2**L, V].
        spec: the trellis.
        ends: "tail_biting" is QTIP's two passes: the tile rolled by half, then the tile with both
            ends pinned to the overlap found at the seam. "tail_biting_exact" tries every overlap
            and needs at most 256. "free" does not close the path. An int tensor [B] of overlaps
            in [0, U) pins both ends of each tile.
        backend: "auto", "torch", "cpu", "triton" or "cuda"; see ``resolve_backend``.

    Returns:
        Path, detached from the autograd graph.

    Raises:
        ValueError: shapes or values that do not fit, or ends for which no path exists.
        RuntimeError: a backend that is not installed.
    """
    states = best_states(w, codebook, spec, ends=ends, backend=backend)
    w = w.detach()
    table = codebook.detach().to(w)
    values = table[states.to(torch.int64)]
    cost = (values.double() - w.double()).square().sum((1, 2)).to(w.dtype)
    return Path(states, values, cost)


def best_states(
    w: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    *,
    ends: Ends = "tail_biting",
    backend: Backend = "auto",
    check_values: bool = True,
) -> Tensor:
    """``viterbi``'s states alone, int32 [B, N].

    ``check_values=False`` leaves out the checks that wait for the device: for many calls in a row
    whose weights are known to be finite. Of weights that are not, the states are anything valid.
    """
    check_problem(w, codebook, spec, values=check_values)
    pins = resolve_pins(ends, w, spec, values=check_values)
    w = w.detach()
    # Without gradients it stays the same object, by which the CUDA kernels know it again.
    table = (codebook.detach() if codebook.requires_grad else codebook).to(w)
    if isinstance(ends, str) and ends == "tail_biting_exact":
        return _exact_tail_biting(w, table, spec, backend)
    return _best_path(
        w, table, spec, pins, backend, tail_biting=isinstance(ends, str) and ends == "tail_biting"
    )


def _exact_tail_biting(w: Tensor, codebook: Tensor, spec: TrellisSpec, backend: Backend) -> Tensor:
    batch, steps, _ = w.shape
    if spec.num_overlaps > EXACT_OVERLAPS:
        raise ValueError(
            f"ends='tail_biting_exact' tries every overlap and takes at most {EXACT_OVERLAPS}, "
            f"this trellis has {spec.num_overlaps}; use ends='tail_biting'"
        )
    least = w.new_full((batch,), torch.inf)
    states = torch.zeros(batch, steps, dtype=torch.int32, device=w.device)
    for overlap in range(spec.num_overlaps):
        pins = torch.full((batch,), overlap, dtype=torch.int64, device=w.device)
        candidate = _best_path(w, codebook, spec, pins, backend)
        cost = (codebook[candidate.to(torch.int64)] - w).square().sum((1, 2))
        better = cost < least
        least = torch.where(better, cost, least)
        states = torch.where(better.unsqueeze(1), candidate, states)
    return states
