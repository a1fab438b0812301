"""Several runs side by side: what each is called, how it was made and what it reached."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softtrellis.evaluation.run_log import Comparison, Row, Run, read_run
from softtrellis.evaluation.run_settings import flat_settings, read_settings


@dataclass(frozen=True)
class ComparedRun:
    """One of several runs.

    Attributes:
        name: a short one, that no other of the runs has.
        run: log and results.
        model: the name, in the results, of the model that the run made; None without results.
        settings: as ``read_settings`` gives them.
    """

    name: str
    run: Run
    model: str | None
    settings: dict[str, str]

    @property
    def row(self) -> Row | None:
        """The results of the model that the run made."""
        return next((row for row in self.run.rows if row.name == self.model), None)

    @property
    def other_rows(self) -> list[Row]:
        """The results of the models beside it: the reference, and what the training started at."""
        return [row for row in self.run.rows if row.name != self.model]


def read_runs(directories: Sequence[Path]) -> list[ComparedRun]:
    """Read the runs, in the order in which they are given.

    The model that a run made is the row of its results that is called as its directory is, and
    the last row if none is.

    Raises:
        FileNotFoundError: a directory that is no run's.
        ValueError: a directory is given twice, or a file is damaged; the message names it.
    """
    names = short_names(directories)
    return [_read(name, path) for name, path in zip(names, directories, strict=True)]


def _read(name: str, directory: Path) -> ComparedRun:
    run = read_run(directory)
    own = directory.resolve().name
    models = [row.name for row in run.rows]
    named = [model for model in models if Path(model).name == own]
    model = (named or models)[-1] if models else None
    return ComparedRun(name, run, model, read_settings(directory) or flat_settings(run.settings))


def short_names(directories: Sequence[Path]) -> list[str]:
    """The fewest last parts of the paths that tell them apart, less what all of them end with.

    Raises:
        ValueError: a directory is given twice.
    """
    paths = [directory.resolve() for directory in directories]
    if len(set(paths)) < len(paths):
        raise ValueError("a run is named twice; name each once")
    parts = [list(path.parts) for path in paths]
    while len(parts) > 1 and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    depth = 1
    while len({tuple(each[-depth:]) for each in parts}) < len(parts):
        depth += 1
    return ["/".join(each[-depth:]) for each in parts]


def compare_with_first(
    runs: Sequence[ComparedRun], metric: str
) -> tuple[list[Comparison], list[str]]:
    """Paired comparisons of every later run with the first one that has results.

    Returns:
        The comparisons, under the runs' names, and why there is none for some of the runs.
    """
    from softtrellis.evaluation.divergence import compare_windows

    measured = [(run, run.model) for run in runs if run.model is not None and run.run.windows]
    comparisons: list[Comparison] = []
    reasons: list[str] = []
    for other, model in measured[1:]:
        first, first_model = measured[0]
        try:
            found = compare_windows(other.run, first.run, model, first_model, metric=metric)
        except ValueError as error:
            reasons.append(f"{other.name} is not compared with {first.name}: {error}.")
            continue
        comparisons.append(
            Comparison(other.name, first.name, metric, found.mean, found.low, found.high)
        )
    return comparisons, reasons
