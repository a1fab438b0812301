"""Figures of a run: SVG in the page's text colour for the report, and a PNG for a README."""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from softtrellis.evaluation.run_log import BASELINE, REFERENCE, TRAINED, Comparison, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Mid tones, so that one picture reads on a light and on a dark page.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3b82c4", "#d9722e", "#2b9a66", "#9a63c0", "#808890"
COLOURS = {REFERENCE: GREY, BASELINE: ORANGE, TRAINED: BLUE}
_TEXT = "#010203"  # stands for the page's text colour until the SVG is written
_MAX_LABELLED_LAYERS = 40

Draw = Callable[["Axes", Run], None]


@dataclass(frozen=True)
class Plot:
    """One figure of the report: inline SVG, the text read out in its stead, and a caption."""

    svg: str
    alt: str
    caption: str
    wide: bool = False


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
        panels.append(_draw_loss_and_temperature)
    paired = _main_comparison(run)
    if paired is not None:
        panels.append(partial(_draw_window_pairs, comparison=paired))
    if run.series("drift")[0]:
        panels.append(_draw_drift_and_codes)
    if not panels:
        return False
    with _figure(5.0 * len(panels), 3.9, "#20262c") as figure:
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, draw in zip(all_axes, panels, strict=True):
            draw(axes, run)
        figure.savefig(path, format="png", dpi=160, facecolor="white")
    return True


def _loss_plots(run: Run) -> Iterator[Plot]:
    for key, draw, caption in (
        ("loss", _draw_loss, "Training loss of each step; the strong line is a running mean."),
        ("temperature", _draw_temperature, "Temperature of the soft quantizer."),
    ):
        if run.series(key)[0]:
            yield _plot(run, draw, _spoken(run, key, key), caption)


def _drift_plots(run: Run) -> Iterator[Plot]:
    if run.series("drift")[0]:
        caption = (
            "How far the latent weights have moved from their start, in standard deviations of the "
            "weights, against the radius σ/√(2πS) beyond which arXiv 2605.10655 expects codes to "
            "change."
        )
        yield _plot(run, _draw_drift, _spoken(run, "drift", "RMS drift"), caption)
    if run.series("changed_codes")[0] or run.series("changed_tiles")[0]:
        caption = "Hard codes, and tiles with at least one of them, that differ from the start."
        alt = _spoken(run, "changed_codes", "share of changed codes")
        yield _plot(run, _draw_changed, alt, caption)
    if run.series("entropy")[0]:
        caption = "Mean entropy of the states' marginals: 0 means that the soft path is a hard one."
        yield _plot(run, _draw_entropy, _spoken(run, "entropy", "entropy"), caption)
    if run.series("soft_hard_gap")[0]:
        caption = "RMS distance between the soft weights that are trained and the hard ones kept."
        yield _plot(run, _draw_gap, _spoken(run, "soft_hard_gap", "soft-to-hard gap"), caption)


def _comparison_plots(run: Run) -> Iterator[Plot]:
    for comparison in run.comparisons:
        differences = paired_differences(run, comparison)
        if not differences:
            continue
        lower = sum(d < 0 for d in differences)
        label = _metric_label(comparison.metric)
        alt = (
            f"Paired differences of {label} over {len(differences)} windows, {comparison.a} minus "
            f"{comparison.b}: {lower} of them below zero, mean {comparison.mean:.4g}, "
            f"interval {comparison.low:.4g} to {comparison.high:.4g}."
        )
        caption = (
            f"Each bar is one held-out window, sorted: {comparison.a} minus {comparison.b}. "
            f"{comparison.a} is lower in {lower} of {len(differences)}. "
            "Line and band: mean and bootstrap interval."
        )
        yield _plot(run, partial(_draw_differences, comparison=comparison), alt, caption)


def _layer_plots(run: Run) -> Iterator[Plot]:
    layers = run.layers
    if len(layers) < 2:
        return
    keys = [key for key in ("drift", "changed_codes") if any(run.series(key, n)[0] for n in layers)]
    if not keys:
        return
    height = 1.5 + 0.17 * min(len(layers), _MAX_LABELLED_LAYERS)
    with _figure(11.0, height, _TEXT) as figure:
        for index, key in enumerate(keys):
            axes = figure.add_subplot(1, len(keys), index + 1)
            _draw_heatmap(figure, axes, run, layers, key, labelled=index == 0)
        svg = _svg(figure)
    alt = f"Heat maps over {len(layers)} layers and the measured steps: {', '.join(keys)}."
    yield Plot(svg, alt, "Drift and changed codes of each layer over the training.", wide=True)


_BUILDERS: tuple[Callable[[Run], Iterator[Plot]], ...] = (
    _comparison_plots,
    _loss_plots,
    _drift_plots,
    _layer_plots,
)


def paired_differences(run: Run, comparison: Comparison) -> list[float]:
    """Per-window a - b of the comparison's metric, in nats per token; empty if not recorded."""
    sides = [run.windows.get(name) for name in (comparison.a, comparison.b)]
    scores = [side.metric(comparison.metric) if side else None for side in sides]
    if scores[0] is None or scores[1] is None or len(scores[0]) != len(scores[1]):
        return []
    return [a - b for a, b in zip(scores[0], scores[1], strict=True)]


def _main_comparison(run: Run) -> Comparison | None:
    candidates = [c for c in run.comparisons if paired_differences(run, c)]
    candidates.sort(key=lambda c: (c.a, c.b, c.metric) != (TRAINED, BASELINE, "kl"))
    return candidates[0] if candidates else None


# Panels


def _draw_loss(axes: "Axes", run: Run) -> None:
    steps, values = run.series("loss")
    window = max(1, len(values) // 20)
    smooth = window > 1
    axes.plot(steps, values, color=BLUE, linewidth=1, alpha=0.4 if smooth else 1)
    if smooth:
        axes.plot(steps, _running_mean(values, window), color=BLUE, linewidth=2)
    _label(axes, "Loss", "loss")


def _draw_temperature(axes: "Axes", run: Run) -> None:
    axes.plot(*run.series("temperature"), color=ORANGE, linewidth=2, linestyle="--")
    _label(axes, "Temperature", "temperature (weight variances)")
    axes.set_ylim(bottom=0)


def _draw_loss_and_temperature(axes: "Axes", run: Run) -> None:
    _draw_loss(axes, run)
    axes.set_title("Loss and temperature")
    axes.yaxis.label.set_color(BLUE)
    if run.series("temperature")[0]:
        right = axes.twinx()
        right.grid(False)
        _draw_temperature(right, run)
        right.set_title("")
        right.spines["right"].set_visible(True)
        right.yaxis.label.set_color(ORANGE)


def _draw_drift(axes: "Axes", run: Run, keys: Sequence[str] = ("drift", "drift_max")) -> None:
    labels = {"drift": "RMS", "drift_max": "largest"}
    radius = run.predicted_radius
    _draw_log(axes, run, {key: labels[key] for key in keys}, GREEN, floor=radius)
    if radius:
        axes.axhline(radius, color=PURPLE, linestyle="--", label="predicted radius")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", ncols=3)
    _label(axes, "Drift of the latent weights", "drift (σ)")


def _draw_changed(axes: "Axes", run: Run) -> None:
    labels = {"changed_codes": "codes", "changed_tiles": "tiles"}
    if _draw_log(axes, run, labels, BLUE, scale=100):
        axes.legend(loc="lower right", ncols=2)
    else:
        axes.text(0.5, 0.5, "nothing changed", transform=axes.transAxes, ha="center")
    _label(axes, "Changed since the start", "changed (%)")


def _draw_log(
    axes: "Axes",
    run: Run,
    labels: Mapping[str, str],
    colour: str,
    *,
    scale: float = 1.0,
    floor: float | None = None,
) -> bool:
    """Draw what is above zero on a logarithmic axis; returns whether there was anything."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    lowest = [floor] if floor else []
    for (key, label), style in zip(labels.items(), ("o-", "s:"), strict=False):
        points = [(x, scale * y) for x, y in zip(*run.series(key), strict=True) if y > 0]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, markersize=3.5, label=label)
            lowest.append(min(y for _, y in points))
    if axes.lines:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(lowest) / 3)  # room for the legend
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    return bool(axes.lines)


def _draw_drift_and_codes(axes: "Axes", run: Run) -> None:
    _draw_drift(axes, run, keys=("drift",))
    axes.yaxis.label.set_color(GREEN)
    steps, values = run.series("changed_codes")
    if steps:
        axes.set_title("Drift and changed codes")
        right = axes.twinx()
        right.grid(False)
        right.spines["right"].set_visible(True)
        percent = [100 * v for v in values]
        right.plot(steps, percent, "s-", color=BLUE, markersize=3.5)
        right.set_ylim(0, min(102.0, 1.15 * max(percent)) if max(percent) > 0 else 1.0)
        right.set_ylabel("changed codes (%)", color=BLUE)


def _draw_entropy(axes: "Axes", run: Run) -> None:
    axes.plot(*run.series("entropy"), "o-", color=PURPLE, markersize=3.5)
    axes.set_ylim(bottom=0)
    _label(axes, "Entropy of the marginals", "nats per trellis step")


def _draw_gap(axes: "Axes", run: Run) -> None:
    axes.plot(*run.series("soft_hard_gap"), "o-", color=ORANGE, markersize=3.5)
    axes.set_ylim(bottom=0)
    _label(axes, "Soft-to-hard gap", "RMS gap (σ)")


def _draw_differences(axes: "Axes", run: Run, comparison: Comparison) -> None:
    differences = sorted(paired_differences(run, comparison))
    colours = [COLOURS[TRAINED] if d < 0 else COLOURS[BASELINE] for d in differences]
    axes.bar(range(1, len(differences) + 1), differences, width=0.85, color=colours)
    axes.axhspan(comparison.low, comparison.high, color=GREY, alpha=0.3, linewidth=0)
    axes.axhline(comparison.mean, color=GREY, linewidth=2)
    axes.axhline(0, color=axes.xaxis.label.get_color(), linewidth=0.8)
    metric = _metric_label(comparison.metric)
    _label(
        axes, f"Difference of {metric} per window", f"{metric} (nats per token)", "window, sorted"
    )


def _draw_window_pairs(axes: "Axes", run: Run, comparison: Comparison) -> None:
    first = run.windows[comparison.a].metric(comparison.metric) or ()
    second = run.windows[comparison.b].metric(comparison.metric) or ()
    metric = _metric_label(comparison.metric)
    axes.scatter(second, first, s=16, color=BLUE, alpha=0.7, linewidth=0)
    ends = [min(*first, *second), max(*first, *second)]
    margin = 0.05 * (ends[1] - ends[0]) or 0.05
    limits = (ends[0] - margin, ends[1] + margin)
    axes.plot(limits, limits, color=GREY, linewidth=1, linestyle="--")
    axes.set(xlim=limits, ylim=limits)
    _label(
        axes,
        f"{metric} per held-out window",
        f"{comparison.a} (nats per token)",
        f"{comparison.b} (nats per token)",
    )
    corner = 0.04 if comparison.mean <= 0 else 0.96  # where the points are not
    axes.text(
        corner,
        1 - corner,
        f"below the line: {comparison.a} is better\n"
        f"mean difference {comparison.mean:+.4f}\n"
        f"95% interval {comparison.low:+.4f} to {comparison.high:+.4f}",
        transform=axes.transAxes,
        ha="left" if comparison.mean <= 0 else "right",
        va="top" if comparison.mean <= 0 else "bottom",
        fontsize=8,
    )


def _draw_heatmap(
    figure: "Figure", axes: "Axes", run: Run, layers: Sequence[str], key: str, *, labelled: bool
) -> None:
    steps = sorted({step for name in layers for step in run.series(key, name)[0]})
    scale = 100.0 if key == "changed_codes" else 1.0
    grid: list[list[float]] = []
    for name in layers:
        known = dict(zip(*run.series(key, name), strict=True))
        grid.append([scale * known.get(step, math.nan) for step in steps])
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.grid(False)
    ticks = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
    axes.set_xticks(ticks, [str(steps[i]) for i in ticks])
    if labelled and len(layers) <= _MAX_LABELLED_LAYERS:
        axes.set_yticks(range(len(layers)), [shorten(name) for name in layers], fontsize=7)
    else:
        axes.set_yticks([])
    title = {"drift": "RMS drift (σ)", "changed_codes": "changed codes (%)"}[key]
    _label(axes, title, "")
    figure.colorbar(image, ax=axes)


# Helpers


def shorten(name: str) -> str:
    """Drop the parts of a layer's name that every Llama-like model shares."""
    return name.removeprefix("model.layers.").removeprefix("model.")


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    means: list[float] = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def _metric_label(metric: str) -> str:
    return {"kl": "KL", "nll": "log loss"}.get(metric, metric)


def _spoken(run: Run, key: str, label: str) -> str:
    steps, values = run.series(key)
    if not steps:
        return f"Plot of {label} over the training."
    ends = ((steps[0], values[0]), (steps[-1], values[-1]))
    return f"Plot of {label}: " + ", ".join(f"{v:.4g} at step {s}" for s, v in ends) + "."


def _label(axes: "Axes", title: str, y_label: str, x_label: str = "step") -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def _plot(run: Run, draw: Draw, alt: str, caption: str) -> Plot:
    with _figure(5.6, 3.4, _TEXT) as figure:
        draw(figure.subplots(), run)
        return Plot(_svg(figure), alt, caption)


@contextmanager
def _figure(width: float, height: float, text: str) -> Iterator["Figure"]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.edgecolor": text,
            "axes.labelcolor": text,
            "axes.titlecolor": text,
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": GREY,
            "grid.alpha": 0.25,
            "text.color": text,
            "xtick.color": text,
            "ytick.color": text,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "svg.fonttype": "none",
            "svg.hashsalt": "softtrellis",
        }
    ):
        yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: "Figure") -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", text))  # the others would repeat from figure to figure
    text = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", text)
    return text.replace(_TEXT, "currentColor")
