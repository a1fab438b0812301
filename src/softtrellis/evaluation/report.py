"""The report of a run: one HTML file without scripts or outside references, and a PNG."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from softtrellis.evaluation.figures import Plot
from softtrellis.evaluation.page import html_figures, html_table, write_page
from softtrellis.evaluation.panels import shorten
from softtrellis.evaluation.plots import report_plots, write_main_plot
from softtrellis.evaluation.run_log import (
    BASELINE,
    TRAINED,
    Comparison,
    Row,
    Run,
    parse_rows,
    read_run,
)

_HEADINGS = ("model", "perplexity", "KL to reference", "bits per weight", "bytes")
_LAYER_COLUMNS = {
    "drift": "drift, RMS (σ)",
    "drift_max": "drift, largest (σ)",
    "changed_codes": "changed codes (%)",
    "changed_tiles": "changed tiles (%)",
    "entropy": "entropy (nats)",
    "soft_hard_gap": "soft-to-hard gap (σ)",
}


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write report.html and main.png into a run directory, from its log.jsonl and results.json.

    A part that the run did not write (training or evaluation) is left out, with a sentence that
    says so. main.png is written where there is anything to plot.

    Args:
        run_dir: a directory that `quickstart`, `train` or `eval` wrote.
        output: an HTML file to write instead of report.html; the picture is then the PNG of the
            same name.

    Returns:
        The path of the HTML file.

    Raises:
        FileNotFoundError: neither of the two files is there.
        ValueError: one of them is damaged; the message names the place.
    """
    run = read_run(run_dir)
    target = run_dir / "report.html" if output is None else output
    picture = run_dir / "main.png" if output is None else output.with_suffix(".png")
    write_page(
        target,
        picture,
        title=run.title,
        body=_body(run, report_plots(run)),
        draw_picture=partial(write_main_plot, run),
    )
    return target


def format_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Result rows as plain text in aligned columns, without a trailing newline.

    Args:
        rows: mappings with "name" and, where measured, "perplexity", "kl" (nats per token),
            "bits_per_weight" and "bytes", as in results.json. A column that no row has is left out.
    """
    return align_columns(*results_table(list(parse_rows(rows))))


def results_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the result table; a column that no row has is left out."""
    columns: list[list[str]] = [
        [row.name for row in rows],
        [_number(row.perplexity, ".2f") for row in rows],
        [_number(row.kl, ".4f") for row in rows],
        [_number(row.bits_per_weight, ".3f") for row in rows],
        [_number(row.bytes, ",d") for row in rows],
    ]
    measured = [i for i, c in enumerate(columns) if i == 0 or any(cell != "–" for cell in c)]
    cells = [[columns[i][line] for i in measured] for line in range(len(rows))]
    return [_HEADINGS[i] for i in measured], cells


def format_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Results of tasks as plain text: a line per metric, and in each model's column
    "value ± standard error".

    Args:
        tasks: by model and task, mappings with "items" and "metrics", as in results.json; the
            same tasks for every model.
    """
    first = next(iter(tasks.values()))
    cells = [
        [task, metric, f"{result['items']:,d}"]
        + [_estimate(results[task]["metrics"][metric]) for results in tasks.values()]
        for task, result in first.items()
        for metric in result["metrics"]
    ]
    return align_columns(["task", "metric", "items", *tasks], cells)


def align_columns(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Plain text in columns, the first to the left and the others to the right.

    Args:
        headings: one per column.
        cells: the lines below, each with one cell per column.
    """
    lines = [headings, *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def verdict(
    comparison: Comparison, baseline: float | None = None, *, held_out: bool = False
) -> tuple[str, str]:
    """What a paired comparison shows, in plain words.

    Args:
        comparison: mean and 95% interval of a - b; lower is better in every metric.
        baseline: the metric of b, to say how large the difference is; optional.
        held_out: whether the text is known not to be what the models were trained on.

    Returns:
        ("better" | "worse" | "open", the sentences).
    """
    c = comparison
    what = {"kl": "KL divergence to the reference", "nll": "log loss"}.get(c.metric, c.metric)
    text = "held-out text" if held_out else "this text"
    interval = f"95% interval {c.low:+.4f} to {c.high:+.4f}"
    share = f", {100 * abs(c.mean) / baseline:.1f}% of {c.b}'s" if baseline else ""
    if not all(math.isfinite(x) for x in (c.mean, c.low, c.high)):
        return "open", f"{c.a} and {c.b} cannot be compared: their {what} is not a finite number."
    if c.high < 0 or c.low > 0:
        kind, verb, side = (
            ("better", "beats", "lower") if c.high < 0 else ("worse", "is worse than", "higher")
        )
        return kind, (
            f"{c.a} {verb} {c.b}: on {text} its {what} is {side} by {abs(c.mean):.4f} nats "
            f"per token{share} (difference {c.mean:+.4f}, {interval}, which excludes 0)."
        )
    return "open", (
        f"{c.a} is not shown to beat {c.b}: the difference of their {what} on {text} is "
        f"{c.mean:+.4f} nats per token ({interval}, which includes 0)."
    )


def _body(run: Run, plots: Sequence[Plot]) -> Iterable[str]:
    yield from _verdicts(run)
    for note in run.notes:
        yield f'<p class="note">{escape(note)}</p>'
    if run.rows:
        headings, cells = results_table(run.rows)
        yield f"<h2>Results</h2>{html_table(headings, cells)}"
        yield (
            '<p class="note">Perplexity and KL divergence (nats per token) on the same '
            "windows of text; lower is better.</p>"
        )
    if run.steps:
        yield f"<p>{escape(_training_summary(run))}</p>"
    else:
        yield '<p class="note">This run has no training log: its training plots are left out.</p>'
    if plots:
        yield f"<h2>Plots</h2>{html_figures(plots)}"
    yield from _layer_table(run)
    for heading, entries in (("Settings", run.settings), ("Environment", run.environment)):
        if entries:
            cells = [[str(key), str(value)] for key, value in entries.items()]
            yield f"<h2>{heading}</h2>{html_table((), cells, 'plain')}"


def _verdicts(run: Run) -> Iterable[str]:
    if not run.comparisons:
        yield '<p class="note">This run has no evaluation that compares two models.</p>'
    kl = {row.name: row.kl for row in run.rows}
    ordered = sorted(run.comparisons, key=lambda c: (c.a, c.b) != (TRAINED, BASELINE))
    for comparison in ordered:
        known = kl.get(comparison.b) if comparison.metric == "kl" else None
        kind, words = verdict(comparison, known, held_out=run.held_out)
        yield f'<p class="verdict {kind}">{escape(words)}</p>'


def _training_summary(run: Run) -> str:
    first, last = run.steps[0], run.steps[-1]
    text = f"Training: {len(run.steps)} steps"
    if last.get("seconds") is not None:
        text += f" in {last['seconds']:.0f} s"
    if first.get("loss") is not None and last.get("loss") is not None:
        text += f", loss {first['loss']:.4g} at the first and {last['loss']:.4g} at the last"
    losses = [step["loss"] for step in run.steps if step.get("loss") is not None]
    broken = sum(not math.isfinite(loss) for loss in losses)
    if broken:
        text += f" (not a finite number in {broken} steps)"
    drift = run.series("drift")[1]
    if drift and run.predicted_radius:
        text += (
            f"; the latent weights moved by {drift[-1]:.3g} σ (RMS), "
            f"{drift[-1] / run.predicted_radius:.3g} times the predicted radius of "
            f"{run.predicted_radius:.3g} σ"
        )
    changed = run.series("changed_codes")[1]
    if changed:
        text += f"; {100 * changed[-1]:.3g}% of the codes changed"
    return text + "."


def _layer_table(run: Run) -> Iterable[str]:
    layers = run.layers
    final = {
        (name, key): values[-1]
        for name in layers
        for key in _LAYER_COLUMNS
        if (values := run.series(key, name)[1])
    }
    keys = [key for key in _LAYER_COLUMNS if any((name, key) in final for name in layers)]
    if not keys:
        return
    tops = {key: max(v for (_, k), v in final.items() if k == key) for key in keys}
    lines = []
    for name in layers:
        cells = [f'<th scope="row">{escape(shorten(name))}</th>']
        for key in keys:
            value = final.get((name, key))
            if value is None:
                cells.append("<td>–</td>")
                continue
            share = value / tops[key] if tops[key] > 0 else 0.0
            shown = f"{100 * value:.3g}" if key.startswith("changed") else f"{value:.3g}"
            cells.append(f'<td class="heat" style="--share:{share:.3f}">{shown}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f'<th scope="col">{_LAYER_COLUMNS[key]}</th>' for key in keys)
    yield (
        f"<h2>Layers</h2><details{' open' if len(layers) <= 16 else ''}>"
        f"<summary>{len(layers)} layers at their last measurement</summary>"
        f'<div class="scroll"><table class="layers"><thead><tr><th scope="col">layer</th>{heads}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def _estimate(metric: Mapping[str, Any]) -> str:
    error = metric["stderr"]
    return f"{metric['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")
