"""Clocks, and the rates that floors are made of."""

from __future__ import annotations

import os
import time

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from softtrellis.recipes.timing import measure_rates, time_calls


def test_rates_of_the_cpu() -> None:
    rates = measure_rates("cpu")
    assert rates is not None
    assert 1e6 < rates.exponentials < 1e14
    assert 1e6 < rates.additions < 1e14


def test_calls_are_counted_and_ordered() -> None:
    calls: list[float] = []

    def call() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.002 * (len(calls) % 3))

    timing = time_calls(call, "cpu", repeats=9, seconds=10.0)
    assert timing.repeats == 9 < len(calls)
    assert 0 < timing.low < timing.median < timing.high < 0.1
    assert timing.peak_bytes is None


def test_long_calls_are_repeated_three_times() -> None:
    calls: list[int] = []
    timing = time_calls(lambda: calls.append(1), "cpu", repeats=1000, seconds=1e-9)
    assert (timing.repeats, len(calls)) == (3, 4)


def test_the_kernels_compute_what_they_count() -> None:
    pytest.importorskip("triton")
    from softtrellis.recipes import rates_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = torch.linspace(0, 1, 2 * rates_triton.BLOCK, device=device)
    x, expected = start.clone(), start
    count = rates_triton.exponentials(x, 2)
    assert count == x.numel() * 2 * rates_triton.UNROLL
    for _ in range(count // x.numel()):
        expected = torch.exp2(-expected)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=0)

    x, y = start.clone(), start.flip(0) - 0.5
    expected = start
    count = rates_triton.additions(x, y, 2)
    for _ in range(count // x.numel()):
        expected = torch.minimum(expected + y, y)
    torch.testing.assert_close(x, expected)


@pytest.mark.gpu
def test_a_gpu_counts_its_memory() -> None:
    rates = measure_rates("cuda")
    assert rates is not None
    assert 1e11 < rates.exponentials < rates.additions < 1e15

    def call() -> torch.Tensor:
        scratch = torch.ones(1 << 24, device="cuda")
        return scratch[: 1 << 20] * 2.0

    timing = time_calls(call, "cuda", repeats=5, seconds=1.0)
    assert timing.repeats == 5
    assert timing.peak_bytes is not None
    assert 4 << 24 <= timing.peak_bytes <= (4 << 24) + (4 << 20)
