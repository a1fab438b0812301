"""How long calls take, how much memory they need, and how fast the device could at best be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch

Device = Literal["cpu", "cuda"]
T = TypeVar("T")

MIN_REPEATS = 3
_CACHED_FLOATS = 1 << 15  # what torch gives to one thread at a time; two such arrays fit its cache
_CPU_CALLS = 64
_GPU_PROGRAMS = 64  # for each multiprocessor: several times what it holds at once
_GPU_ROUNDS = 1 << 10
_RATE_SECONDS = 0.3


@dataclass(frozen=True)
class Timing:
    """Seconds per call, and memory.

    Attributes:
        median, low, high: the median and the 20th and 80th percentile, in seconds.
        repeats: calls that were timed.
        peak_bytes: most memory allocated on the GPU during a call, beyond what was there before it
            and what it returned; None on the CPU, where nothing counts it.
    """

    median: float
    low: float
    high: float
    repeats: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Rates:
    """What a device can do in a second.

    Attributes:
        exponentials: base-2 exponentials of float32 values.
        additions: additions of float32 values, each followed by a minimum.
    """

    exponentials: float
    additions: float


def _timed(call: Callable[[], T], device: Device) -> tuple[float, T]:
    """(seconds, what the call returned); on a GPU between two events around the call."""
    if device == "cpu":
        began = time.perf_counter()
        result = call()
        return time.perf_counter() - began, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result


def _warm_up(call: Callable[[], object], device: Device, seconds: float) -> None:
    deadline = time.perf_counter() + seconds
    while True:
        _timed(call, device)
        if time.perf_counter() >= deadline:
            return


def time_calls(
    call: Callable[[], object], device: Device, *, repeats: int, seconds: float
) -> Timing:
    """Times a function after a warm-up of at least one call.

    Args:
        call: the function; what it returns counts as its outputs and is dropped before the next.
        device: "cuda" is torch's current CUDA device.
        repeats: at most so many calls are timed.
        seconds: no further call starts after that long, once ``MIN_REPEATS`` are timed.
    """
    _warm_up(call, device, seconds / 10)
    times: list[float] = []
    peak: int | None = None
    deadline = time.perf_counter() + seconds
    while len(times) < repeats and (len(times) < MIN_REPEATS or time.perf_counter() < deadline):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elapsed, outputs = _timed(call, device)
        times.append(elapsed)
        if device == "cuda":
            beyond = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            peak = max(peak or 0, beyond)
        del outputs
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    found = torch.quantile(torch.tensor(times, dtype=torch.float64), quantiles)
    median, low, high = found.tolist()
    return Timing(median, low, high, len(times), peak)


def measure_rates(device: Device) -> Rates | None:
    """The best of several runs with all processors at work; None on a GPU without Triton.

    On the CPU torch's own operations run on arrays that stay in the cache, on a GPU chains of
    independent operations in registers.
    """
    if device == "cpu":
        return Rates(_rate(_cpu_exponentials(), device), _rate(_cpu_additions(), device))
    if find_spec("triton") is None:
        return None
    from softtrellis.recipes import rates_triton

    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    size = processors * _GPU_PROGRAMS * rates_triton.BLOCK
    x, y = (torch.full((size,), 0.5, device=device) for _ in range(2))
    return Rates(
        _rate(partial(rates_triton.exponentials, x, _GPU_ROUNDS), device),
        _rate(partial(rates_triton.additions, x, y, _GPU_ROUNDS), device),
    )


def _cpu_exponentials() -> Callable[[], int]:
    size = _CACHED_FLOATS * torch.get_num_threads()
    x, y = torch.full((size,), 0.5), torch.empty(size)

    def run() -> int:
        for _ in range(_CPU_CALLS):
            torch.exp2(x, out=y)
        return _CPU_CALLS * size

    return run


def _cpu_additions() -> Callable[[], int]:
    size = _CACHED_FLOATS * torch.get_num_threads()
    x, y = torch.full((size,), 0.5), torch.full((size,), 0.5)

    def run() -> int:
        for _ in range(_CPU_CALLS):
            torch.add(x, y, out=y)
            torch.minimum(x, y, out=y)
        return _CPU_CALLS * size

    return run


def _rate(run: Callable[[], int], device: Device) -> float:
    """Operations per second of a function that returns how many it did."""
    _warm_up(run, device, _RATE_SECONDS / 10)
    best = 0.0
    deadline = time.perf_counter() + _RATE_SECONDS
    while not best or time.perf_counter() < deadline:
        elapsed, count = _timed(run, device)
        best = max(best, count / elapsed)
    return best
