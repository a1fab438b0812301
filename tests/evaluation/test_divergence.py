from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.support import results, write_run

from softtrellis.evaluation.divergence import Interval, compare_results, paired_bootstrap


@pytest.fixture
def scores() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    b = torch.rand(60, generator=generator, dtype=torch.float64)
    a = b + 0.1 + 0.2 * torch.randn(60, generator=generator, dtype=torch.float64)
    weights = torch.randint(50, 200, (60,), generator=generator)
    return a, b, weights


def test_against_numpy(scores):
    a, b, weights = (x.numpy() for x in scores)
    random = np.random.default_rng(5)
    means = []
    for _ in range(20_000):
        drawn = random.integers(len(a), size=len(a))
        means.append(np.average((a - b)[drawn], weights=weights[drawn]))
    low, high = np.quantile(means, [0.05, 0.95])
    found = paired_bootstrap(*scores, resamples=20_000, level=0.9)
    assert found.mean == pytest.approx(np.average(a - b, weights=weights), rel=1e-12)
    assert found.low == pytest.approx(low, abs=0.002)
    assert found.high == pytest.approx(high, abs=0.002)


def test_width_is_that_of_the_normal_approximation(scores):
    a, b, _ = scores
    found = paired_bootstrap(a, b, torch.ones(60))
    half = 1.96 * float((a - b).std()) / math.sqrt(60)
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)


def test_pairing_removes_what_windows_have_in_common(scores):
    _, b, weights = scores
    found = paired_bootstrap(1000 * b + 0.25, 1000 * b, weights)
    assert found.low == pytest.approx(0.25)
    assert found.high == pytest.approx(0.25)


def test_seed(scores):
    first = paired_bootstrap(*scores, resamples=200)
    assert paired_bootstrap(*scores, resamples=200) == first
    assert paired_bootstrap(*scores, resamples=200, seed=1) != first


def test_many_windows():
    n = 3 << 19
    found = paired_bootstrap(torch.ones(n), torch.zeros(n), torch.ones(n), resamples=3)
    assert found == Interval(1.0, 1.0, 1.0)


def test_swapping_changes_the_sign(scores):
    a, b, weights = scores
    there, back = paired_bootstrap(a, b, weights), paired_bootstrap(b, a, weights)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))
    assert there.excludes_zero
    assert back.excludes_zero


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False), (0.0, 0.1, False)],
)
def test_excludes_zero(low, high, expected):
    assert Interval((low + high) / 2, low, high).excludes_zero is expected


@pytest.mark.parametrize(
    ("a", "weights", "options", "message"),
    [
        ([1.0], [1.0], {}, "at least 2 windows"),
        ([1.0, 2.0], [1.0], {}, "of one length"),
        ([1.0, math.nan], [1.0, 1.0], {}, "finite"),
        ([1.0, 2.0], [1.0, 0.0], {}, "positive"),
        ([1.0, 2.0], [1.0, 1.0], {"level": 95}, "level between 0 and 1"),
        ([1.0, 2.0], [1.0, 1.0], {"resamples": 0}, "resamples"),
    ],
)
def test_bad_input(a, weights, options, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(torch.tensor(a), torch.zeros(len(a)), torch.tensor(weights), **options)


def results_file(directory: Path, mean: float) -> Path:
    return write_run(directory, content=results(mean)) / "results.json"


def test_two_results_files(tmp_path: Path) -> None:
    a, b = results_file(tmp_path / "a", -0.6), results_file(tmp_path / "b", -0.3)
    found = compare_results(a, b)
    windows = [json.loads(path.read_text("utf-8"))["windows"]["BCJR-QAT"] for path in (a, b)]
    kl = [torch.tensor(w["kl"], dtype=torch.float64) / 2047 for w in windows]
    expected = paired_bootstrap(*kl, torch.tensor(windows[0]["tokens"]))
    assert (found.mean, found.low, found.high) == (expected.mean, expected.low, expected.high)
    assert found.high < 0
    assert (found.a, found.b) == (f"{a}: BCJR-QAT", f"{b}: BCJR-QAT")
    assert found.metric == "kl"


def test_two_models_of_one_file(tmp_path: Path) -> None:
    path = results_file(tmp_path, -0.6)
    found = compare_results(path, path, model_b="PTQ")
    assert (found.a, found.b) == ("BCJR-QAT", "PTQ")
    assert found.mean < 0
    assert compare_results(path, path, model_b="PTQ", metric="nll").mean == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"model_a": "GPTQ"}, "no model 'GPTQ'; it has full precision, PTQ", id="a"),
        pytest.param({"model_b": "GPTQ"}, "no model 'GPTQ'", id="b"),
        pytest.param({"metric": "acc"}, "no scores 'acc' of windows for BCJR-QAT", id="metric"),
    ],
)
def test_models_and_metrics_that_are_not_there(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    path = results_file(tmp_path, -0.6)
    with pytest.raises(ValueError, match=message):
        compare_results(path, path, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda windows: [w.update({k: v[:39] for k, v in w.items()}) for w in windows.values()],
            r"\(40 windows, 81880 tokens, and 39 windows, 79833 tokens\)",
            id="fewer",
        ),
        pytest.param(
            lambda windows: windows["full precision"].update(nll=[1.0] * 40),
            "the same first MODEL",
            id="other-text",
        ),
        pytest.param(
            lambda windows: [w.pop("nll") for w in windows.values()],
            "the same first MODEL",
            id="no-log-loss",
        ),
        pytest.param(lambda windows: windows.clear(), "no scores of windows", id="tasks-only"),
    ],
)
def test_files_of_other_windows(tmp_path: Path, change, message: str) -> None:
    content = results(-0.6)
    change(content["windows"])
    other = write_run(tmp_path / "b", content=content) / "results.json"
    with pytest.raises(ValueError, match=message):
        compare_results(results_file(tmp_path / "a", -0.6), other)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        compare_results(tmp_path / "a.json", tmp_path / "b.json")
