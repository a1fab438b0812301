"""What a run directory says: the training log and the results, read and checked."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from softtrellis.io.errors import DAMAGED

REFERENCE = "full precision"
BASELINE = "PTQ"
TRAINED = "BCJR-QAT"


@dataclass(frozen=True)
class Row:
    """One model of the result table; what was not measured is None.

    kl is in nats per token to the reference, bytes the size of the weights on disk.
    """

    name: str
    perplexity: float | None = None
    kl: float | None = None
    bits_per_weight: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Mean of metric(a) - metric(b) over tokens, with the ends of its bootstrap interval."""

    a: str
    b: str
    metric: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Windows:
    """Scores of each window in nats per token; a metric that was not measured is None."""

    nll: tuple[float, ...] | None
    kl: tuple[float, ...] | None
    tokens: tuple[int, ...]

    def metric(self, name: str) -> tuple[float, ...] | None:
        """The scores called `name` in a comparison."""
        return {"nll": self.nll, "kl": self.kl}.get(name)


@dataclass(frozen=True)
class Run:
    """A run directory's contents; parts that the run did not write are empty.

    steps are the log's records with their steps counted from 1, as `train` counts them; the log
    itself counts from 0. held_out is whether the evaluated windows are known not to be trained on.
    """

    title: str = "softtrellis run"
    steps: tuple[Mapping[str, Any], ...] = ()
    rows: tuple[Row, ...] = ()
    windows: Mapping[str, Windows] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    predicted_radius: float | None = None
    held_out: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def series(self, key: str, layer: str | None = None) -> tuple[list[int], list[float]]:
        """Steps at which `key` (of one layer, if named) was a finite number, and these numbers."""
        steps: list[int] = []
        values: list[float] = []
        for record in self.steps:
            source = record if layer is None else record.get("layers", {}).get(layer, {})
            value = source.get(key)
            if _is_finite(value):
                steps.append(int(record["step"]))
                values.append(float(value))
        return steps, values

    def curve(self, key: str, against: str) -> tuple[list[float], list[float]]:
        """`against` and `key` of the records in which both are finite numbers."""
        pairs = [(record.get(against), record.get(key)) for record in self.steps]
        known = [(x, y) for x, y in pairs if _is_finite(x) and _is_finite(y)]
        return [float(x) for x, _ in known], [float(y) for _, y in known]

    @property
    def layers(self) -> list[str]:
        """Names of the layers with their own measurements, in the order of the log."""
        return list(
            dict.fromkeys(name for record in self.steps for name in record.get("layers", ()))
        )


def read_run(run_dir: Path) -> Run:
    """Read log.jsonl and results.json; either may be absent, but not both.

    Raises:
        FileNotFoundError: the directory or both files are missing.
        ValueError: a file is not what a run writes; the message names the place.
    """
    log, results = run_dir / "log.jsonl", run_dir / "results.json"
    if not log.is_file() and not results.is_file():
        raise FileNotFoundError(
            f"{run_dir} has neither log.jsonl nor results.json; "
            "give the directory that train, eval or quickstart wrote."
        )
    steps, notes = _read_log(log) if log.is_file() else ((), ())
    return replace(read_results(results) if results.is_file() else Run(), steps=steps, notes=notes)


def read_results(path: Path) -> Run:
    """Read a file that `eval --json` or `quickstart` wrote; the run has no training log.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what they write; the message names the place.
    """
    content = _read_object(path)
    try:
        return _build(content)
    except DAMAGED as error:
        raise ValueError(
            f"{path} is not a results file of this version ({type(error).__name__}: {error}); "
            "evaluate the run again."
        ) from error


def _read_log(path: Path) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    records: dict[int, Mapping[str, Any]] = {}
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if number == len(lines) and not text.endswith("\n"):
                note = "The last line of log.jsonl is cut off and was left out."
                return _in_order(records), (note,)
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}, line {number} is not an object with an integer 'step'.")
        layers = record.get("layers", {})
        if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
            raise ValueError(f"{path}, line {number} has layers that are not objects.")
        records[record["step"]] = record  # a resumed run may log a step twice: the later one counts
    return _in_order(records), ()


def _in_order(records: Mapping[int, Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    return tuple({**records[step], "step": step + 1} for step in sorted(records))


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    return content


def _build(content: Mapping[str, Any]) -> Run:
    return Run(
        title=str(content.get("title", Run.title)),
        rows=tuple(parse_rows(content.get("rows", ()))),
        windows={name: _windows(name, w) for name, w in content.get("windows", {}).items()},
        comparisons=tuple(
            Comparison(
                a=str(c["a"]),
                b=str(c["b"]),
                metric=str(c["metric"]),
                mean=float(c["mean"]),
                low=float(c["low"]),
                high=float(c["high"]),
            )
            for c in content.get("comparisons", ())
        ),
        predicted_radius=_optional(content, "predicted_radius"),
        held_out=content.get("held_out") is True,
        settings=dict(content.get("settings", {})),
        environment=dict(content.get("environment", {})),
    )


def parse_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Table rows as results.json has them -> rows; keys that a row lacks become None."""
    for row in rows:
        size = row.get("bytes")
        yield Row(
            name=str(row["name"]),
            perplexity=_optional(row, "perplexity"),
            kl=_optional(row, "kl"),
            bits_per_weight=_optional(row, "bits_per_weight"),
            bytes=None if size is None else int(size),
        )


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _optional(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return None if value is None else float(value)


def _windows(name: str, scores: Mapping[str, Any]) -> Windows:
    tokens = tuple(int(n) for n in scores["tokens"])

    def per_token(key: str) -> tuple[float, ...] | None:
        sums = scores.get(key)
        if sums is None:
            return None
        if len(sums) != len(tokens):
            raise ValueError(f"windows of {name!r}: {len(sums)} {key} but {len(tokens)} tokens")
        return tuple(float(s) / n for s, n in zip(sums, tokens, strict=True))

    return Windows(nll=per_token("nll"), kl=per_token("kl"), tokens=tokens)
