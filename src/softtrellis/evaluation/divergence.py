"""Comparing two models on the same windows of text."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from softtrellis.evaluation.run_log import Comparison, Run, Windows, read_results

_CHUNK_NUMBERS = 1 << 20
_SAME_SCORE = 1e-4
"""Relative difference of a window's log loss that another device or batch size makes, at most."""


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


def compare_results(
    path_a: Path,
    path_b: Path,
    *,
    metric: str = "kl",
    model_a: str | None = None,
    model_b: str | None = None,
) -> Comparison:
    """Compare models of two results files, window by window; see :func:`paired_bootstrap`.

    Args:
        path_a: what ``eval --json`` or ``quickstart`` wrote.
        path_b: the same for the second model; may be the same file.
        metric: "kl", KL divergence to the reference, or "nll", log loss.
        model_a: name of the model in its file; None is the last one.
        model_b: the same for the second model.

    Returns:
        Mean of a - b in nats per token, with the ends of its 95% interval. A model is called by
        its name in the file; if both have the same, with the file's path before it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a results file, a model or metric that it does not have, or files whose
            windows or whose reference are not the same.
    """
    first, second = read_results(path_a), read_results(path_b)
    name_a = _model_of(first, model_a, path_a)
    name_b = _model_of(second, model_b, path_b)
    found = compare_windows(first, second, name_a, name_b, metric=metric)
    if name_a != name_b:
        return found
    return replace(found, a=f"{path_a}: {name_a}", b=f"{path_b}: {name_b}")


def compare_windows(a: Run, b: Run, model_a: str, model_b: str, *, metric: str) -> Comparison:
    """Compare a model of one run's results with a model of another's, window by window.

    That both were scored on the same windows, against the same reference, is seen from the scores
    of the reference: the first model of each.

    Raises:
        ValueError: a model without scores of the metric, fewer than two windows, or runs whose
            windows or whose reference are not the same.
    """
    _check_same_windows(a, b)
    first = torch.tensor(_scores(a, model_a, metric), dtype=torch.float64)
    second = torch.tensor(_scores(b, model_b, metric), dtype=torch.float64)
    found = paired_bootstrap(first, second, torch.tensor(a.windows[model_a].tokens))
    return Comparison(model_a, model_b, metric, found.mean, found.low, found.high)


def _model_of(run: Run, name: str | None, path: Path) -> str:
    if not run.windows:
        raise ValueError(f"{path} has no scores of windows; evaluate the models on text")
    if name is None:
        return list(run.windows)[-1]
    if name not in run.windows:
        raise ValueError(f"{path} has no model {name!r}; it has {', '.join(run.windows)}")
    return name


def _scores(run: Run, name: str, metric: str) -> tuple[float, ...]:
    windows = run.windows.get(name)
    scores = None if windows is None else windows.metric(metric)
    if scores is None:
        raise ValueError(f"there are no scores {metric!r} of windows for {name}")
    return scores


def _check_same_windows(a: Run, b: Run) -> None:
    first, second = _reference(a), _reference(b)
    if first.tokens != second.tokens:
        raise ValueError(
            f"windows of other sizes ({_windows_in_words(first)}, and {_windows_in_words(second)});"
            " evaluate both with the same --ctx and --windows"
        )
    same = first.nll is not None and second.nll is not None
    pairs = zip(first.nll or (), second.nll or (), strict=False)
    if not same or not all(math.isclose(x, y, rel_tol=_SAME_SCORE) for x, y in pairs):
        raise ValueError(
            "the first models, which are the references, have other scores: evaluate both with "
            "the same first MODEL and the same --data, --ctx and --windows"
        )


def _reference(run: Run) -> Windows:
    if not run.windows:
        raise ValueError("no scores of windows; evaluate the models on text")
    return next(iter(run.windows.values()))


def _windows_in_words(windows: Windows) -> str:
    return f"{len(windows.tokens)} windows, {sum(windows.tokens)} tokens"
