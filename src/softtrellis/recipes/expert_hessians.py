"""Second moments for experts that too few tokens were routed to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def fill_sparse_hessians(
    hessians: dict[str, Tensor],
    counts: dict[str, int],
    groups: dict[str, list[str]],
    *,
    least: int,
) -> list[str]:
    """Gives experts that saw few tokens the Hessian of all experts beside them.

    That is the mean over a group's members, weighted by their counts: E[x xᵀ] over all tokens
    routed to any of them. Where a whole group saw nothing, its entries are removed, which means
    plain Viterbi.

    Args:
        hessians: float [in, in] by name, E[x xᵀ]; entries of filled names are replaced. Members
            of a group share one new tensor; no tensor is changed. A member may be absent if its
            count is 0.
        counts: tokens that each member of a group saw.
        groups: members by group, see ``expert_groups``; each name in one group at most.
        least: members that saw fewer tokens are filled.

    Returns:
        The names of these members, in the order of the groups.

    Raises:
        ValueError: ``least`` below 1.
        KeyError: a member without a count, or with a count above 0 and no Hessian.
    """
    if least < 1:
        raise ValueError(f"least must be at least 1, got {least}")
    filled: list[str] = []
    for members in groups.values():
        sparse = [name for name in members if counts[name] < least]
        if not sparse:
            continue
        mean = _mean(hessians, counts, members)
        for name in sparse:
            if mean is None:
                hessians.pop(name, None)
            else:
                hessians[name] = mean
        filled += sparse
    return filled


def _mean(
    hessians: dict[str, Tensor], counts: dict[str, int], names: Iterable[str]
) -> Tensor | None:
    seen = [name for name in names if counts[name] > 0]
    if not seen:
        return None
    total = torch.zeros_like(hessians[seen[0]])
    for name in seen:
        total.add_(hessians[name], alpha=counts[name])
    return total / sum(counts[name] for name in seen)
