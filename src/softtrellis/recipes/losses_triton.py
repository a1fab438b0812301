"""KL divergences of rows of logits in two reads of them, see ``losses``."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 2048, 8


@triton.jit
def _kl_rows(p, q, divergence, slope, vocabulary, WITH_SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p += row * vocabulary
    q += row * vocabulary
    lanes = tl.arange(0, BLOCK)
    nothing = -1e30  # no infinity: its difference from itself is no number
    peak_p = tl.full([BLOCK], nothing, tl.float32)
    peak_q = tl.full([BLOCK], nothing, tl.float32)
    sum_p = tl.zeros([BLOCK], tl.float32)
    sum_q = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)  # of exp(p) (p - q)
    for start in range(0, vocabulary, BLOCK):
        inside = start + lanes < vocabulary
        a = tl.load(p + start + lanes, mask=inside, other=nothing)
        b = tl.load(q + start + lanes, mask=inside, other=nothing)
        new_p = tl.maximum(peak_p, a)
        new_q = tl.maximum(peak_q, b)
        old = tl.exp(peak_p - new_p)
        weight = tl.exp(a - new_p)
        gap = gap * old + weight * (a - b)
        sum_p = sum_p * old + weight
        sum_q = sum_q * tl.exp(peak_q - new_q) + tl.exp(b - new_q)
        peak_p = new_p
        peak_q = new_q
    top_p = tl.max(peak_p, 0)
    top_q = tl.max(peak_q, 0)
    share = tl.exp(peak_p - top_p)
    total = tl.sum(sum_p * share, 0)
    log_p = tl.log(total)  # over the largest, as their sum would lose the last bits of this one
    log_q = tl.log(tl.sum(sum_q * tl.exp(peak_q - top_q), 0))
    mean_gap = tl.sum(gap * share, 0) / total
    tl.store(divergence + row, mean_gap - (top_p - top_q) - (log_p - log_q))
    if WITH_SLOPE:
        slope += row * vocabulary
        for start in range(0, vocabulary, BLOCK):
            inside = start + lanes < vocabulary
            a = tl.load(p + start + lanes, mask=inside, other=nothing)
            b = tl.load(q + start + lanes, mask=inside, other=nothing)
            likely = tl.exp(a - top_p - log_p)
            tl.store(slope + start + lanes, tl.exp(b - top_q - log_q) - likely, mask=inside)


def kl_of_logits(p: Tensor, q: Tensor, *, slope: bool) -> tuple[Tensor, Tensor | None]:
    """``losses.kl_of_logits`` of contiguous float32 tensors."""
    p, q = p.contiguous(), q.contiguous()
    rows, vocabulary = p.shape
    divergence = torch.empty(rows, dtype=torch.float32, device=p.device)
    found = torch.empty_like(q) if slope else None
    if rows:
        _kl_rows[(rows,)](
            p,
            q,
            divergence,
            q if found is None else found,
            vocabulary,
            WITH_SLOPE=slope,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return divergence, found
