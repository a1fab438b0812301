"""Comparing two models on the same windows of text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_NUMBERS = 1 << 20


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the estimate is settled at the interval's level."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    *,
    resamples: int = 10000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Estimate the weighted mean of a - b, with a percentile bootstrap interval over windows.

    Windows are drawn with replacement, with both models' scores and the weight of each; the
    estimate is ``sum(weights * (a - b)) / sum(weights)``. For window sums as in
    :class:`~softtrellis.evaluation.perplexity.WindowScores`, pass ``scores.kl / scores.tokens``
    and ``scores.tokens``: the result is then in nats per token.

    Args:
        a: [n] mean score per token of each window, first model.
        b: [n] the same for the second model.
        weights: [n] positive; the tokens of each window.
        resamples: how many bootstrap samples.
        level: of the interval, between 0 and 1.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: fewer than 2 windows, different lengths, values that are not finite, weights
            that are not positive.
    """
    count = len(a)
    if not (a.shape == b.shape == weights.shape == (count,)):
        raise ValueError(
            f"a, b and weights must be [n] of one length, got {list(a.shape)}, {list(b.shape)}, "
            f"{list(weights.shape)}."
        )
    if count < 2:
        raise ValueError(f"A bootstrap needs at least 2 windows, got {count}: give more text.")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"resamples must be at least 1 and level between 0 and 1, got {resamples}, {level}."
        )
    weight = weights.to("cpu", torch.float64)
    difference = a.to("cpu", torch.float64) - b.to("cpu", torch.float64)
    if not (difference.isfinite().all() and weight.isfinite().all() and (weight > 0).all()):
        raise ValueError("a and b must be finite, and weights finite and positive.")
    weighted = weight * difference
    generator = torch.Generator().manual_seed(seed)
    means = []
    rows = max(1, _CHUNK_NUMBERS // count)
    for first in range(0, resamples, rows):
        drawn = min(rows, resamples - first)
        index = torch.randint(count, (drawn, count), generator=generator)
        means.append(weighted[index].sum(1) / weight[index].sum(1))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(tails).tolist()
    return Interval(float(weighted.sum() / weight.sum()), low, high)
