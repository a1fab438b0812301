"""What the figures of a run show: each function draws one panel onto matplotlib axes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from softtrellis.evaluation.figures import GREY
from softtrellis.evaluation.run_log import Comparison, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Mid tones, so that one picture reads on a light and on a dark page.
BLUE, ORANGE, GREEN, PURPLE = "#3b82c4", "#d9722e", "#2b9a66", "#9a63c0"
MAX_LABELLED_LAYERS = 40


def paired_differences(run: Run, comparison: Comparison) -> list[float]:
    """Per-window a - b of the comparison's metric, in nats per token; empty if not recorded
    or not finite.
    """
    sides = [run.windows.get(name) for name in (comparison.a, comparison.b)]
    scores = [side.metric(comparison.metric) if side else None for side in sides]
    if scores[0] is None or scores[1] is None or len(scores[0]) != len(scores[1]):
        return []
    differences = [a - b for a, b in zip(scores[0], scores[1], strict=True)]
    return differences if all(math.isfinite(d) for d in differences) else []


def draw_loss(axes: "Axes", run: Run) -> None:
    """Loss of each step, with a running mean over a twentieth of the steps."""
    steps, values = run.series("loss")
    window = max(1, len(values) // 20)
    smooth = window > 1
    axes.plot(steps, values, color=BLUE, linewidth=1 if smooth else 2, alpha=0.4 if smooth else 1)
    if smooth:
        axes.plot(steps, running_mean(values, window), color=BLUE, linewidth=2)
    _label(axes, "Loss", "loss")


def draw_heldout(axes: "Axes", run: Run) -> None:
    """KL to the teacher on held-out windows, of the soft and of the hardened model."""
    for key, label, style, colour in (
        ("heldout_kl", "soft", "o-", BLUE),
        ("heldout_kl_hard", "hard", "s--", ORANGE),
    ):
        if run.series(key)[0]:
            axes.plot(*run.series(key), style, color=colour, markersize=3.5, label=label)
    axes.legend()
    _label(axes, "Held-out KL", "KL (nats per token)")


def draw_temperature(axes: "Axes", run: Run) -> None:
    """Temperature of each step."""
    axes.plot(*run.series("temperature"), color=ORANGE, linewidth=2, linestyle="--")
    _label(axes, "Temperature", "temperature (weight variances)")
    axes.set_ylim(bottom=0)


def draw_loss_and_temperature(axes: "Axes", run: Run) -> None:
    """Loss on the left axis, temperature on the right."""
    draw_loss(axes, run)
    axes.set_title("Loss and temperature")
    axes.yaxis.label.set_color(BLUE)
    if run.series("temperature")[0]:
        right = axes.twinx()
        right.grid(False)
        draw_temperature(right, run)
        right.set_title("")
        right.spines["right"].set_visible(True)
        right.yaxis.label.set_color(ORANGE)


def draw_drift(axes: "Axes", run: Run, keys: Sequence[str] = ("drift", "drift_max")) -> None:
    """Drift of the latent weights, and the predicted radius as a line."""
    labels = {"drift": "RMS", "drift_max": "largest"}
    radius = run.predicted_radius
    _draw_log(axes, run, {key: labels[key] for key in keys}, GREEN, level=radius)
    if radius:
        axes.axhline(radius, color=PURPLE, linestyle="--", label="predicted radius")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", ncols=3)
    _label(axes, "Drift of the latent weights", "drift (σ)")


def draw_changed(axes: "Axes", run: Run) -> None:
    """Share of codes and of tiles that differ from the start."""
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
    level: float | None = None,
) -> bool:
    """Draw what is above zero on a logarithmic axis; returns whether there was anything."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    shown = [level] if level else []
    for (key, label), style in zip(labels.items(), ("o-", "s:"), strict=False):
        points = [(x, scale * y) for x, y in zip(*run.series(key), strict=True) if y > 0]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, markersize=3.5, label=label)
            shown += [y for _, y in points]
    if axes.lines:
        axes.set_yscale("log")
        axes.set_ylim(min(shown) / 3, 1.5 * max(shown))  # room for the legend
        axes.set_xlim(*_step_limits(run))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    return bool(axes.lines)


def draw_drift_and_codes(axes: "Axes", run: Run) -> None:
    """Drift and radius on the left axis, share of changed codes on the right."""
    draw_drift(axes, run, keys=("drift",))
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


def draw_line(axes: "Axes", run: Run, key: str, title: str, y_label: str, colour: str) -> None:
    """One logged quantity against the steps, from zero up."""
    axes.plot(*run.series(key), "o-", color=colour, markersize=3.5)
    axes.set_ylim(bottom=0)
    _label(axes, title, y_label)


def draw_differences(axes: "Axes", run: Run, comparison: Comparison) -> None:
    """Sorted per-window differences as bars, with their mean and interval."""
    differences = sorted(paired_differences(run, comparison))
    colours = [BLUE if d < 0 else ORANGE for d in differences]
    axes.bar(range(1, len(differences) + 1), differences, width=0.85, color=colours)
    axes.axhspan(comparison.low, comparison.high, color=GREY, alpha=0.3, linewidth=0)
    axes.axhline(comparison.mean, color=GREY, linewidth=2)
    axes.axhline(0, color=axes.xaxis.label.get_color(), linewidth=0.8)
    metric = metric_label(comparison.metric)
    _label(
        axes, f"Difference of {metric} per window", f"{metric} (nats per token)", "window, sorted"
    )


def draw_window_pairs(axes: "Axes", run: Run, comparison: Comparison) -> None:
    """One point per window, b across and a upwards; below the diagonal a is better."""
    first = run.windows[comparison.a].metric(comparison.metric) or ()
    second = run.windows[comparison.b].metric(comparison.metric) or ()
    metric = metric_label(comparison.metric)
    axes.scatter(second, first, s=16, color=BLUE, alpha=0.7, linewidth=0)
    ends = [min(*first, *second), max(*first, *second)]
    margin = 0.05 * (ends[1] - ends[0]) or 0.05
    limits = (ends[0] - margin, ends[1] + margin)
    axes.plot(limits, limits, color=GREY, linewidth=1, linestyle="--")
    axes.set(xlim=limits, ylim=limits)
    axes.locator_params(nbins=5)
    _label(
        axes,
        f"{metric} per window",
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


def draw_heatmap(
    figure: "Figure", axes: "Axes", run: Run, layers: Sequence[str], key: str, *, labelled: bool
) -> None:
    """One logged quantity over layers (down) and steps (across), with a colour bar."""
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
    y_label = ""
    if labelled and len(layers) <= MAX_LABELLED_LAYERS:
        axes.set_yticks(range(len(layers)), [shorten(name) for name in layers], fontsize=7)
    else:
        axes.set_yticks([])
        y_label = "layers, first at the top" if labelled else ""
    title = {"drift": "RMS drift (σ)", "changed_codes": "changed codes (%)"}[key]
    _label(axes, title, y_label)
    figure.colorbar(image, ax=axes)


def shorten(name: str) -> str:
    """Drop the parts of a layer's name that every Llama-like model shares."""
    return name.removeprefix("model.layers.").removeprefix("model.")


def _step_limits(run: Run) -> tuple[float, float]:
    first, last = run.steps[0]["step"], run.steps[-1]["step"]
    margin = 0.05 * (last - first) or 0.5
    return first - margin, last + margin


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values up to each one, over fewer at the start."""
    means: list[float] = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def metric_label(metric: str) -> str:
    """How a comparison's metric is written in titles."""
    return {"kl": "KL", "nll": "log loss"}.get(metric, metric)


def _label(axes: "Axes", title: str, y_label: str, x_label: str = "step") -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
