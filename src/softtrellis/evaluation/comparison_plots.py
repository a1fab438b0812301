"""The figures of several runs side by side, and a PNG of the main ones."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from softtrellis.evaluation.compared_runs import ComparedRun
from softtrellis.evaluation.comparison_panels import (
    CHANGED,
    DRIFT,
    GAP,
    HELDOUT_HARD,
    HELDOUT_SOFT,
    LOSS,
    TEMPERATURE,
    Quantity,
    draw_curves,
    draw_intervals,
    draw_swatch,
    has_curve,
    line_style,
)
from softtrellis.evaluation.figures import PNG_TEXT, Plot, new_figure, svg_of
from softtrellis.evaluation.run_log import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_SECTIONS: tuple[tuple[str, tuple[Quantity, ...], tuple[str, ...]], ...] = (
    ("Loss", (LOSS,), ("step", "tokens", "seconds")),
    ("Held-out KL", (HELDOUT_SOFT, HELDOUT_HARD), ("step", "tokens", "seconds")),
    ("On the way", (TEMPERATURE, CHANGED, DRIFT, GAP), ("step",)),
)
_PICTURE = (LOSS, HELDOUT_SOFT, HELDOUT_HARD, TEMPERATURE, CHANGED, DRIFT, GAP)
_PICTURE_COLUMNS = 3


def comparison_plots(
    runs: Sequence[ComparedRun], comparisons: Sequence[Comparison]
) -> Iterator[tuple[str, list[Plot]]]:
    """Headings and figures of everything that any of the runs has data for."""
    if comparisons:
        yield "Paired differences", [_interval_plot(runs, comparisons)]
    for heading, quantities, axes in _SECTIONS:
        plots = [
            _curve_plot(runs, quantity, against)
            for quantity in quantities
            for against in axes
            if has_curve(runs, quantity, against)
        ]
        if plots:
            yield heading, plots


def swatch(index: int) -> str:
    """The line and marker of the run at a place in the order, as SVG."""
    with new_figure(0.6, 0.24) as figure:
        draw_swatch(figure.subplots(), index)
        return svg_of(figure).replace("<svg ", '<svg class="swatch" aria-hidden="true" ', 1)


def write_comparison_picture(
    runs: Sequence[ComparedRun], comparisons: Sequence[Comparison], path: Path
) -> bool:
    """Write the main figures as a PNG on white; returns False, without a file, if there are
    none.
    """
    panels: list[Callable[[Axes], None]] = []
    if comparisons:
        panels.append(partial(draw_intervals, runs=runs, comparisons=comparisons))
    for quantity in _PICTURE:
        if has_curve(runs, quantity, "step"):
            panels.append(partial(draw_curves, runs=runs, quantity=quantity))
    if not panels:
        return False
    columns = min(len(panels), _PICTURE_COLUMNS)
    rows = -(-len(panels) // columns)
    with new_figure(5.0 * columns, 3.4 * rows + 0.5, PNG_TEXT) as figure:
        for place, draw in enumerate(panels, start=1):
            draw(figure.add_subplot(rows, columns, place))
        figure.legend(
            handles=[_handle(index, each.name) for index, each in enumerate(runs)],
            loc="outside lower center",
            ncols=min(len(runs), 2 * columns),
            fontsize=10,
        )
        figure.savefig(path, format="png", dpi=130, facecolor="white")
    return True


def _curve_plot(runs: Sequence[ComparedRun], quantity: Quantity, against: str) -> Plot:
    with new_figure(4.3, 3.1) as figure:
        draw_curves(figure.subplots(), runs, quantity, against)
        svg = svg_of(figure)
    ends = []
    for each in runs:
        values = each.run.curve(quantity.key, against)[1]
        if values:
            first, last = (quantity.scale * value for value in (values[0], values[-1]))
            ends.append(f"{each.name} from {first:.4g} to {last:.4g}")
    alt = f"{quantity.title} against {against}: {'; '.join(ends)}."
    return Plot(svg, alt, quantity.caption)


def _interval_plot(runs: Sequence[ComparedRun], comparisons: Sequence[Comparison]) -> Plot:
    with new_figure(8.0, 1.1 + 0.4 * len(comparisons)) as figure:
        draw_intervals(figure.subplots(), runs, comparisons)
        svg = svg_of(figure)
    found = "; ".join(f"{c.a} {c.mean:+.4f}, {c.low:+.4f} to {c.high:+.4f}" for c in comparisons)
    alt = f"Differences of KL to {comparisons[0].b} with 95% intervals: {found}."
    caption = (
        f"KL on the same windows, less that of {comparisons[0].b}: mean and 95% interval "
        "of a paired bootstrap over windows."
    )
    return Plot(svg, alt, caption, wide=True)


def _handle(index: int, name: str) -> "Line2D":
    from matplotlib.lines import Line2D

    return Line2D([], [], label=name, **line_style(index))
