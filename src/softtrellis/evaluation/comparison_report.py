"""The report of several runs side by side: one HTML file and a PNG."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

from softtrellis.evaluation.compared_runs import ComparedRun, compare_with_first, read_runs
from softtrellis.evaluation.comparison_plots import (
    comparison_plots,
    swatch,
    write_comparison_picture,
)
from softtrellis.evaluation.page import html_figures, html_table, write_page
from softtrellis.evaluation.report import results_table, verdict
from softtrellis.evaluation.run_log import Comparison, Run
from softtrellis.evaluation.run_settings import differing

_ABSENT = "–"


def write_comparison(run_dirs: Sequence[Path], output: Path) -> Path:
    """Write one page on several runs, and the PNG of the same name beside it.

    It shows the settings that differ, the results, what was logged, overlaid by run, and paired
    comparisons of every later run with the first one where their windows are the same.

    Args:
        run_dirs: directories that `quickstart` or `train` wrote, the one to compare with first.
        output: the HTML file.

    Returns:
        output.

    Raises:
        FileNotFoundError: a directory has neither log.jsonl nor results.json.
        ValueError: a directory is given twice, or a file is damaged; the message names it.
    """
    runs = read_runs(run_dirs)
    comparisons, reasons = compare_with_first(runs, "kl")
    write_page(
        output,
        output.with_suffix(".png"),
        title=f"Comparison of {len(runs)} runs",
        body=_body(runs, comparisons, reasons),
        draw_picture=partial(write_comparison_picture, runs, comparisons),
        style="several",
    )
    return output


def _body(
    runs: Sequence[ComparedRun], comparisons: Sequence[Comparison], reasons: Sequence[str]
) -> Iterator[str]:
    rows = {each.name: each.row for each in runs}
    held_out = all(each.run.held_out for each in runs)
    for comparison in comparisons:
        first = rows[comparison.b]
        kind, words = verdict(comparison, first.kl if first else None, held_out=held_out)
        yield f'<p class="verdict {kind}">{escape(words)}</p>'
    yield from _notes(runs, comparisons, reasons)
    marks = {each.name: swatch(index) for index, each in enumerate(runs)}
    yield from _settings(runs, marks)
    yield from _results(runs, marks)
    yield from _training(runs, marks)
    key = "".join(f"<li>{mark}{escape(name)}</li>" for name, mark in marks.items())
    yield f'<ul class="key">{key}</ul>'
    for heading, plots in comparison_plots(runs, comparisons):
        yield f"<h2>{heading}</h2>{html_figures(plots)}"


def _notes(
    runs: Sequence[ComparedRun], comparisons: Sequence[Comparison], reasons: Sequence[str]
) -> Iterator[str]:
    notes = list(reasons)
    if len(comparisons) > 1:
        notes.append(
            "Each interval stands for itself: of twenty runs that are as good as the first, one is "
            "expected to be told apart from it by chance."
        )
    for what, missing in (
        ("results.json: evaluate it for a comparison", [r for r in runs if not r.run.rows]),
        ("log.jsonl: it is not in the plots", [r for r in runs if not r.run.steps]),
        ("settings in softtrellis.json", [r for r in runs if not r.settings]),
    ):
        notes += [f"{each.name} has no {what}." for each in missing]
    notes += [f"{each.name}: {note}" for each in runs for note in each.run.notes]
    for note in notes:
        yield f'<p class="note">{escape(note)}</p>'


def _settings(runs: Sequence[ComparedRun], marks: Mapping[str, str]) -> Iterator[str]:
    known = [each for each in runs if each.settings]
    if not known:
        return
    names = differing([each.settings for each in known])
    yield "<h2>Settings that differ</h2>"
    if names:
        cells = [[e.name, *(e.settings.get(name, _ABSENT) for name in names)] for e in known]
        yield html_table(["run", *names], cells, "plain", [marks[each.name] for each in known])
    else:
        yield '<p class="note">None: the runs were made with the same settings.</p>'
    every = {name: value for each in known for name, value in each.settings.items()}
    shared = [(name, value) for name, value in every.items() if name not in names]
    if shared:
        yield (
            f"<details><summary>{len(shared)} settings are the same</summary>"
            f"{html_table((), shared, 'plain')}</details>"
        )


def _results(runs: Sequence[ComparedRun], marks: Mapping[str, str]) -> Iterator[str]:
    own = [replace(row, name=each.name) for each in runs if (row := each.row)]
    if not own:
        return
    beside = list(dict.fromkeys(row for each in runs for row in each.other_rows))
    headings, cells = results_table([*own, *beside])
    yield "<h2>Results</h2>"
    yield html_table(headings, cells, "", [marks[row.name] for row in own])
    yield (
        '<p class="note">Perplexity and KL divergence (nats per token) on windows of text; lower '
        "is better. Lines without a mark are models that were evaluated beside the runs.</p>"
    )


def _training(runs: Sequence[ComparedRun], marks: Mapping[str, str]) -> Iterator[str]:
    trained = [each for each in runs if each.run.steps]
    if not trained:
        return
    columns: dict[str, Callable[[Run], str]] = {
        "steps": lambda run: f"{len(run.steps):,d}",
        "tokens": lambda run: _last(run, "tokens", ",.0f"),
        "seconds": lambda run: _last(run, "seconds", ",.0f"),
        "skipped": lambda run: _last(run, "skipped", ",.0f"),
        "loss, last 5%": _end_of_loss,
        "soft KL, last": lambda run: _last(run, "heldout_kl", ".4f"),
        "soft KL, best (at step)": lambda run: _best(run, "heldout_kl"),
        "hard KL, last": lambda run: _last(run, "heldout_kl_hard", ".4f"),
        "hard KL, best (at step)": lambda run: _best(run, "heldout_kl_hard"),
        "changed codes (%)": lambda run: _last(run, "changed_codes", ".3g", 100.0),
        "drift (σ)": lambda run: _last(run, "drift", ".3g"),
    }
    cells = {name: [cell(each.run) for each in trained] for name, cell in columns.items()}
    known = {name: column for name, column in cells.items() if set(column) != {_ABSENT}}
    lines = zip([each.name for each in trained], *known.values(), strict=True)
    yield "<h2>Training</h2>"
    yield html_table(["run", *known], lines, "tight", [marks[each.name] for each in trained])
    if {"soft KL, last", "hard KL, last"} & known.keys():
        yield (
            '<p class="note">Soft and hard KL: to the teacher, in nats per token, on the windows '
            "that the training held out; of the soft model that is trained, and hardened.</p>"
        )


def _last(run: Run, key: str, style: str, scale: float = 1.0) -> str:
    values = run.series(key)[1]
    return format(scale * values[-1], style) if values else _ABSENT


def _end_of_loss(run: Run) -> str:
    values = run.series("loss")[1]
    last = values[-max(1, len(values) // 20) :]
    return f"{sum(last) / len(last):.4f}" if last else _ABSENT


def _best(run: Run, key: str) -> str:
    steps, values = run.series(key)
    if not values:
        return _ABSENT
    best = min(values)
    return f"{best:.4f} ({steps[values.index(best)]})"
