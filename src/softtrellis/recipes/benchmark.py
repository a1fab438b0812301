"""Parity and speed of ``bcjr`` and ``viterbi``: correctness first, then times."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import groupby, product
from typing import Any, Literal, get_args

import torch

from softtrellis.backend import Backend, resolve_backend
from softtrellis.codes.codebook import check_code, codebook
from softtrellis.io.progress import progress
from softtrellis.recipes.benchmark_results import (
    OPERATIONS,
    BenchmarkResults,
    Operation,
    Row,
    floor_seconds,
)
from softtrellis.recipes.environment import environment
from softtrellis.recipes.parity import Referee, fresh_pins, fresh_tiles, soft_answers
from softtrellis.recipes.seeds import check_seed
from softtrellis.recipes.timing import MIN_REPEATS, Device, Rates, measure_rates, time_calls
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bcjr import FLOAT32_TEMPERATURES, bcjr
from softtrellis.trellis.viterbi import viterbi

BenchmarkEnds = Literal["auto", "free", "pinned", "tail_biting"]

_CPU_CHECKED_TILES = 16  # the CPU kernels take one tile after the other, whatever their number


@dataclass(frozen=True)
class Case:
    """A code on a trellis; ValueError if it does not exist there."""

    code: str
    spec: TrellisSpec

    def __post_init__(self) -> None:
        check_code(self.code, self.spec)


DEFAULT_CASES = (
    Case("hyb", TrellisSpec(16, 2, 2)),
    Case("hyb", TrellisSpec(14, 2, 2)),
    Case("hyb", TrellisSpec(12, 2, 2)),
    Case("mul1", TrellisSpec(16, 2, 1)),
)


def choose_cases(
    code: str | None = None, L: int | None = None, k: int | None = None, V: int | None = None
) -> tuple[Case, ...]:
    """The default cases; or, if anything is given, the one case with it.

    What is not given is L = 16, k = 2, and the code HYB with V = 2, or V = 1 and the code mul1
    where the other does not fit.

    Raises:
        ValueError: a trellis or code that does not exist.
    """
    if (code, L, k, V) == (None, None, None, None):
        return DEFAULT_CASES
    if code is None:
        code = "mul1" if V == 1 else "hyb"
    if V is None:
        V = 2 if code in ("hyb", "gaussian") else 1
    return (Case(code, TrellisSpec(16 if L is None else L, 2 if k is None else k, V)),)


def default_device() -> Device:
    """ "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_tiles(spec: TrellisSpec, device: Device) -> int:
    """Enough tiles to keep the device busy for a moment."""
    if device == "cpu":
        return 64 if spec.V == 2 else 32
    if spec.L > 14:
        return 31680 if spec.V == 2 else 10560
    return 31680 if spec.L > 12 else 84480


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is checked and timed.

    Attributes:
        cases: codes and trellises.
        device: "cpu" or "cuda", torch's current CUDA device.
        backend: what runs the trellis, see ``resolve_backend``.
        operations: "forward" and "forward-backward" of ``bcjr``, "viterbi".
        ends: "free"; "pinned", to a random overlap per tile; "tail_biting", for ``viterbi`` only;
            "auto" is free ends for ``bcjr`` and tail-biting ones for ``viterbi``.
        temperatures: of ``bcjr``, 0.005 to 1e6.
        tiles: numbers of tiles of 256 weights; empty means ``default_tiles``.
        repeats: at most so many calls are timed, at least 3.
        seconds: of timing for each row, if 3 calls take no longer.
        parity_tiles: tiles that are compared with the reference, at least 2; None is 2 on the CPU
            and 4 on a GPU. Half of them have free ends, the others pinned ones.
        seed: of all random inputs; None is a new one every time.
        show_progress: show a bar on standard error.

    Raises:
        ValueError: settings that make no sense, or a device or backend that is not there.
    """

    cases: tuple[Case, ...] = DEFAULT_CASES
    device: Device = field(default_factory=default_device)
    backend: Backend = "auto"
    operations: tuple[Operation, ...] = OPERATIONS
    ends: BenchmarkEnds = "auto"
    temperatures: tuple[float, ...] = (0.3, 0.05, 0.03)
    tiles: tuple[int, ...] = ()
    repeats: int = 20
    seconds: float = 2.0
    parity_tiles: int | None = None
    seed: int | None = None
    show_progress: bool = False

    def __post_init__(self) -> None:
        for name, found, choices in (
            ("device", self.device, get_args(Device)),
            ("backend", self.backend, get_args(Backend)),
            ("ends", self.ends, get_args(BenchmarkEnds)),
            *(("operation", each, OPERATIONS) for each in self.operations),
        ):
            if found not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {found!r}")
        for name, values in (
            ("case", self.cases),
            ("operation", self.operations),
            ("temperature", self.temperatures),
        ):
            if not values:
                raise ValueError(f"{name} must be given at least once")
        if self.ends == "tail_biting" and set(self.operations) != {"viterbi"}:
            raise ValueError("ends must be free or pinned, unless the only operation is viterbi")
        low, high = FLOAT32_TEMPERATURES
        for temperature in self.temperatures:
            if not low <= temperature <= high:
                raise ValueError(f"temperature must be from {low} to {high:g}, got {temperature}")
        for count in self.tiles:
            if count < 1:
                raise ValueError(f"tiles must be at least 1, got {count}")
        if self.repeats < MIN_REPEATS:
            raise ValueError(f"repeats must be at least {MIN_REPEATS}, got {self.repeats}")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds must be a positive number, got {self.seconds}")
        if self.parity_tiles is not None and self.parity_tiles < 2:
            raise ValueError(f"parity_tiles must be at least 2, got {self.parity_tiles}")
        if self.seed is not None:
            check_seed(self.seed)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu: torch finds no CUDA device here")
        try:
            resolve_backend(self.backend, torch.empty(0, device=self.device))
        except RuntimeError as error:  # a package that is not installed
            raise ValueError(str(error)) from error

    def ends_of(self, operation: Operation) -> str:
        """The ends of an operation, "auto" resolved."""
        if self.ends != "auto":
            return self.ends
        return "tail_biting" if operation == "viterbi" else "free"


@dataclass(frozen=True)
class _Job:
    """What a row is about."""

    case: Case
    operation: Operation
    ends: str
    temperature: float | None
    tiles: int

    @property
    def backward(self) -> bool:
        return self.operation == "forward-backward"


def benchmark(config: BenchmarkConfig) -> BenchmarkResults:
    """Checks every kernel against the float64 reference, and times those that are right.

    All inputs are fresh and random; what torch allocates is filled with NaN during the checks.

    Raises:
        ValueError: a case that the backend does not take.
    """
    seed = secrets.randbits(32) if config.seed is None else config.seed
    generator = torch.Generator(config.device).manual_seed(seed)
    rates = measure_rates(config.device)
    jobs = list(_jobs(config))
    rows: list[Row] = []
    with progress(len(jobs), "benchmark", enabled=config.show_progress) as bar:
        for case, of_case in groupby(jobs, key=lambda job: job.case):
            referee = _referee(config, case, generator)
            for job in of_case:
                rows.append(_row(config, job, referee, rates))
                bar.update(1)
    return BenchmarkResults(_environment(config, seed, rates), rows)


def _jobs(config: BenchmarkConfig) -> Iterator[_Job]:
    for case, operation in product(config.cases, config.operations):
        temperatures = (None,) if operation == "viterbi" else config.temperatures
        numbers = config.tiles or (default_tiles(case.spec, config.device),)
        for T, tiles in product(temperatures, numbers):
            yield _Job(case, operation, config.ends_of(operation), T, tiles)


def _referee(config: BenchmarkConfig, case: Case, generator: torch.Generator) -> Referee:
    return Referee(
        case.spec,
        codebook(case.code, case.spec).to(config.device),
        generator,
        config.parity_tiles or (2 if config.device == "cpu" else 4),
        gradients="forward-backward" in config.operations,
        temperatures=config.temperatures,
    )


def _row(config: BenchmarkConfig, job: _Job, referee: Referee, rates: Rates | None) -> Row:
    spec = job.case.spec
    checked = min(job.tiles, _CPU_CHECKED_TILES) if config.device == "cpu" else job.tiles
    if job.temperature is None:
        parity = referee.hard(job.ends, checked, config.backend)
    else:
        parity = referee.soft(job.temperature, checked, config.backend, gradient=job.backward)
    row = Row(
        code=job.case.code,
        L=spec.L,
        k=spec.k,
        V=spec.V,
        operation=job.operation,
        ends=job.ends,
        temperature=job.temperature,
        tiles=job.tiles,
        wrong=parity.wrong,
        errors={
            name: error if math.isfinite(error) else None for name, error in parity.errors.items()
        },
    )
    if parity.wrong is not None:
        return row
    call = _call(config, job, referee)
    timing = time_calls(call, config.device, repeats=config.repeats, seconds=config.seconds)
    floor = None if rates is None else floor_seconds(spec, job.operation, job.ends, rates)
    return replace(
        row,
        repeats=timing.repeats,
        median_us=1e6 * timing.median / job.tiles,
        p20_us=1e6 * timing.low / job.tiles,
        p80_us=1e6 * timing.high / job.tiles,
        floor_us=None if floor is None else 1e6 * floor,
        share=None if floor is None else floor * job.tiles / timing.median,
        peak_bytes=timing.peak_bytes,
    )


def _call(config: BenchmarkConfig, job: _Job, referee: Referee) -> Callable[[], object]:
    """What is timed: a public function on inputs that are there already."""
    spec, table, generator = job.case.spec, referee.codebook, referee.generator
    T, backend = job.temperature, config.backend
    w = fresh_tiles(job.tiles, spec, generator)
    ends: Any = fresh_pins(job.tiles, spec, generator) if job.ends == "pinned" else job.ends
    if T is None:
        return partial(viterbi, w, table, spec, ends=ends, backend=backend)
    if job.backward:
        upstream = fresh_tiles(job.tiles, spec, generator)
        return partial(soft_answers, w, table, spec, T, ends, upstream, backend)
    return partial(bcjr, w, table, spec, temperature=T, ends=ends, backend=backend)


def _environment(
    config: BenchmarkConfig, seed: int, rates: Rates | None
) -> dict[str, str | int | float | None]:
    facts = environment()
    if config.device == "cuda":
        device = torch.cuda.get_device_name()
        processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    else:
        device, processors = facts["processor"], torch.get_num_threads()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "processors": processors,
        "backend": resolve_backend(config.backend, torch.empty(0, device=config.device)),
        **{name: facts[name] for name in ("softtrellis", "python", "torch", "triton", "numba")},
        "cuda": torch.version.cuda or "none",
        "seed": seed,
        "exponentials_per_second": None if rates is None else rates.exponentials,
        "additions_with_minimum_per_second": None if rates is None else rates.additions,
    }
