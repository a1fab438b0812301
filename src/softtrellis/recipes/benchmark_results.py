"""What a benchmark found, and its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from softtrellis.evaluation.report import align_columns
from softtrellis.recipes.parity import short
from softtrellis.recipes.timing import Rates
from softtrellis.spec import TrellisSpec

Operation = Literal["forward", "forward-backward", "viterbi"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

_SWEEPS: dict[Operation, int] = {"forward": 2, "forward-backward": 4}
_HEADINGS = (
    *("case", "operation", "ends", "T", "tiles", "us/tile", "20%", "80%", "floor", "share"),
    *("peak MiB", "parity"),
)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        code, L, k, V: the case.
        operation, ends, tiles: what was timed.
        temperature: None for "viterbi".
        wrong: what is wrong, in words, and then nothing was timed; None if nothing is.
        errors: relative errors by name; None where something was not finite.
        repeats: calls that were timed.
        median_us, p20_us, p80_us: microseconds per tile: median, 20th and 80th percentile.
        floor_us: microseconds per tile, see ``floor_seconds``; None where no rate was measured.
        share: the floor over the median.
        peak_bytes: most GPU memory beyond inputs and outputs; None on the CPU.
    """

    code: str
    L: int
    k: int
    V: int
    operation: Operation
    ends: str
    temperature: float | None
    tiles: int
    wrong: str | None
    errors: dict[str, float | None]
    repeats: int = 0
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    floor_us: float | None = None
    share: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class BenchmarkResults:
    """What ran where, and how fast: with ``asdict``, the JSON of ``softtrellis bench``."""

    environment: dict[str, str | int | float | None]
    rows: list[Row]

    @property
    def right(self) -> bool:
        """Whether every kernel passed its check."""
        return all(row.wrong is None for row in self.rows)


def floor_seconds(spec: TrellisSpec, operation: Operation, ends: str, rates: Rates) -> float:
    """The measured floor of a tile of 256 weights: one operation per state and sweep.

    For ``bcjr`` it is one base-2 exponential per state in each of two sweeps, four with the
    backward pass; for ``viterbi`` one addition and one minimum per state in each pass, of which
    tail-biting takes two. It is a yardstick and no bound: a kernel that shares exponentials
    between states of equal codewords (HYB at L = 16 has 1024 codewords for 65536 states), or that
    computes them in a cheaper way than the one measured, can exceed 100% of it.

    Args:
        spec: the trellis.
        operation: "forward", "forward-backward" or "viterbi".
        ends: "free", "pinned" or "tail_biting".
        rates: of the device, measured in the same run.

    Returns:
        Seconds per tile.
    """
    states = spec.steps() * spec.num_states
    if operation == "viterbi":
        return states * (2 if ends == "tail_biting" else 1) / rates.additions
    return states * _SWEEPS[operation] / rates.exponentials


def table(results: BenchmarkResults) -> str:
    """What ran where, a line each, and the rows in columns; times in microseconds per tile."""
    facts = [f"{name:34} {_plain(value)}" for name, value in results.environment.items()]
    return "\n".join([*facts, "", align_columns(_HEADINGS, [_cells(row) for row in results.rows])])


def _plain(value: str | int | float | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)


def _cells(row: Row) -> list[str]:
    return [
        f"{row.code} L{row.L} k{row.k} V{row.V}",
        row.operation,
        row.ends,
        "-" if row.temperature is None else f"{row.temperature:g}",
        str(row.tiles),
        *(_time(x) for x in (row.median_us, row.p20_us, row.p80_us, row.floor_us)),
        "-" if row.share is None else f"{row.share:.0%}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        _judgement(row),
    ]


def _time(us: float | None) -> str:
    return "-" if us is None else f"{us:.2f}"


def _judgement(row: Row) -> str:
    if row.wrong is not None:
        return f"wrong: {row.wrong}"
    return short(max(error for error in row.errors.values() if error is not None))
