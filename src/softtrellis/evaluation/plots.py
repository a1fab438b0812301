"""The figures of one run, for its report, and a PNG for a README."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from softtrellis.evaluation.figures import PNG_TEXT, Plot, new_figure, svg_of
from softtrellis.evaluation.panels import (
    MAX_LABELLED_LAYERS,
    ORANGE,
    PURPLE,
    draw_changed,
    draw_differences,
    draw_drift,
    draw_drift_and_codes,
    draw_heatmap,
    draw_heldout,
    draw_line,
    draw_loss,
    draw_loss_and_temperature,
    draw_temperature,
    draw_window_pairs,
    metric_label,
    paired_differences,
)
from softtrellis.evaluation.run_log import BASELINE, TRAINED, Comparison, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes", Run], None]


def report_plots(run: Run) -> list[Plot]:
    """Every figure that the run has data for, in reading order."""
    return [plot for build in _BUILDERS for plot in build(run)]


def write_main_plot(run: Run, path: Path) -> bool:
    """Write the main plot as a PNG on white; returns False, without a file, if nothing is there.

    Up to three panels: loss and temperature; the paired comparison of KL per window; drift of the
    latent weights against the predicted radius, with the share of changed codes.
    """
    panels: list[Draw] = []
    if run.series("loss")[0]:
        panels.append(draw_loss_and_temperature)
    paired = _main_comparison(run)
    if paired is not None:
        panels.append(partial(draw_window_pairs, comparison=paired))
    if run.series("drift")[0]:
        panels.append(draw_drift_and_codes)
    if not panels:
        return False
    with new_figure(5.0 * len(panels), 3.9, PNG_TEXT) as figure:
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, draw in zip(all_axes, panels, strict=True):
            draw(axes, run)
        figure.savefig(path, format="png", dpi=160, facecolor="white")
    return True


def _loss_plots(run: Run) -> Iterator[Plot]:
    for key, draw, caption in (
        ("loss", draw_loss, "Training loss of each step; from 40 steps on, with a running mean."),
        ("temperature", draw_temperature, "Temperature of the soft quantizer."),
    ):
        if run.series(key)[0]:
            yield _plot(run, draw, _spoken(run, key, key), caption)


def _heldout_plots(run: Run) -> Iterator[Plot]:
    keys = [key for key in ("heldout_kl", "heldout_kl_hard") if run.series(key)[0]]
    if keys:
        caption = (
            "KL divergence to the teacher on windows that the training does not see, of the soft "
            "model that is trained and of the hardened one."
        )
        yield _plot(run, draw_heldout, _spoken(run, keys[-1], "held-out KL"), caption)


def _drift_plots(run: Run) -> Iterator[Plot]:
    if run.series("drift")[0]:
        caption = (
            "How far the latent weights are from the codewords that training began with (a start "
            "towards the original weights counts), in standard deviations of the weights, against "
            "the radius σ/√(2πS) beyond which arXiv 2605.10655 expects codes to change."
        )
        yield _plot(run, draw_drift, _spoken(run, "drift", "RMS drift"), caption)
    if run.series("changed_codes")[0] or run.series("changed_tiles")[0]:
        caption = "Hard codes, and tiles with at least one of them, that differ from the start."
        alt = _spoken(run, "changed_codes", "share of changed codes")
        yield _plot(run, draw_changed, alt, caption)
    for key, title, unit, colour, caption in (
        (
            "entropy",
            "Entropy of the marginals",
            "nats per trellis step",
            PURPLE,
            "Mean entropy of the states' marginals: 0 means that the soft path is a hard one.",
        ),
        (
            "soft_hard_gap",
            "Soft-to-hard gap",
            "RMS gap (σ)",
            ORANGE,
            "RMS distance between the soft weights that are trained and the hard ones kept.",
        ),
    ):
        if run.series(key)[0]:
            draw = partial(draw_line, key=key, title=title, y_label=unit, colour=colour)
            yield _plot(run, draw, _spoken(run, key, title.lower()), caption)


def _comparison_plots(run: Run) -> Iterator[Plot]:
    for comparison in run.comparisons:
        differences = paired_differences(run, comparison)
        if not differences:
            continue
        lower = sum(d < 0 for d in differences)
        label = metric_label(comparison.metric)
        alt = (
            f"Paired differences of {label} over {len(differences)} windows, {comparison.a} minus "
            f"{comparison.b}: {lower} of them below zero, mean {comparison.mean:.4g}, "
            f"interval {comparison.low:.4g} to {comparison.high:.4g}."
        )
        caption = (
            f"Each bar is one window, sorted: {comparison.a} minus {comparison.b}. "
            f"{comparison.a} is lower in {lower} of {len(differences)}. "
            "Line and band: mean and bootstrap interval."
        )
        yield _plot(run, partial(draw_differences, comparison=comparison), alt, caption)


def _layer_plots(run: Run) -> Iterator[Plot]:
    layers = run.layers
    if len(layers) < 2:
        return
    keys = [key for key in ("drift", "changed_codes") if any(run.series(key, n)[0] for n in layers)]
    if not keys:
        return
    height = 1.5 + 0.17 * len(layers) if len(layers) <= MAX_LABELLED_LAYERS else 4.5
    with new_figure(11.0, height) as figure:
        for index, key in enumerate(keys):
            axes = figure.add_subplot(1, len(keys), index + 1)
            draw_heatmap(figure, axes, run, layers, key, labelled=index == 0)
        svg = svg_of(figure)
    alt = f"Heat maps over {len(layers)} layers and the measured steps: {', '.join(keys)}."
    yield Plot(svg, alt, "Drift and changed codes of each layer over the training.", wide=True)


_BUILDERS: tuple[Callable[[Run], Iterator[Plot]], ...] = (
    _comparison_plots,
    _loss_plots,
    _heldout_plots,
    _drift_plots,
    _layer_plots,
)


def _main_comparison(run: Run) -> Comparison | None:
    candidates = [c for c in run.comparisons if paired_differences(run, c)]
    candidates.sort(key=lambda c: (c.a, c.b, c.metric) != (TRAINED, BASELINE, "kl"))
    return candidates[0] if candidates else None


def _spoken(run: Run, key: str, label: str) -> str:
    steps, values = run.series(key)
    if not steps:
        return f"Plot of {label} over the training."
    ends = ((steps[0], values[0]), (steps[-1], values[-1]))
    return f"Plot of {label}: " + ", ".join(f"{v:.4g} at step {s}" for s, v in ends) + "."


def _plot(run: Run, draw: Draw, alt: str, caption: str) -> Plot:
    with new_figure(5.6, 3.4) as figure:
        draw(figure.subplots(), run)
        return Plot(svg_of(figure), alt, caption)
