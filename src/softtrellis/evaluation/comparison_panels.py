"""What the figures of several runs show: each function draws one panel onto matplotlib axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softtrellis.evaluation.compared_runs import ComparedRun
from softtrellis.evaluation.figures import GREY
from softtrellis.evaluation.panels import metric_label, running_mean
from softtrellis.evaluation.run_log import Comparison, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours for all kinds of colour vision, without black and yellow, which one of
# a light and a dark page hides.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = "osD^vP"
_LINES = ("-", "--", ":")
_MARKS_ON_A_LINE = 8
_CUT_OFF_ABOVE, _CUT_AT = 4.0, 1.5  # times the highest start
_LOGARITHMIC_FROM = 20.0
_LARGEST_SPAN = 1000.0
_UNITS: dict[str, tuple[tuple[float, float, str], ...]] = {
    "step": (),
    "tokens": (
        (1e9, 1e9, "billion tokens"),
        (1e6, 1e6, "million tokens"),
        (1e4, 1e3, "thousand tokens"),
    ),
    "seconds": ((7200.0, 3600.0, "hours"), (180.0, 60.0, "minutes")),
}
"""From which number on an axis has which unit: (number, its divisor, label)."""


@dataclass(frozen=True)
class Quantity:
    """A key of the log, and how it is drawn.

    Attributes:
        key: in ``log.jsonl``.
        title: of the panel.
        unit: at the vertical axis.
        caption: what it is.
        scale: what the logged numbers are multiplied by.
        smooth: draw a running mean.
        falls: is meant to fall from its start. Then a run that rises far above the highest
            start is cut off, and leaves room for the others; of other quantities the vertical
            axis starts at 0.
    """

    key: str
    title: str
    unit: str
    caption: str
    scale: float = 1.0
    smooth: bool = False
    falls: bool = False


LOSS = Quantity(
    "loss",
    "Loss",
    "loss",
    "Training loss, running mean over a twentieth of the steps.",
    smooth=True,
    falls=True,
)
HELDOUT_SOFT = Quantity(
    "heldout_kl",
    "Held-out KL, soft",
    "KL (nats per token)",
    "KL divergence to the teacher on held-out windows, of the soft model that is trained.",
    falls=True,
)
HELDOUT_HARD = Quantity(
    "heldout_kl_hard",
    "Held-out KL, hard",
    "KL (nats per token)",
    "KL divergence to the teacher on held-out windows, of the hardened model.",
    falls=True,
)
TEMPERATURE = Quantity(
    "temperature",
    "Temperature",
    "temperature (weight variances)",
    "Temperature of the soft quantizer.",
)
CHANGED = Quantity(
    "changed_codes",
    "Changed codes",
    "changed (%)",
    "Hard codes that differ from the start.",
    scale=100.0,
)
DRIFT = Quantity(
    "drift",
    "Drift of the latent weights",
    "RMS drift (σ)",
    "How far the latent weights are from the codewords that training began with (a start towards "
    "the original weights counts), in the weights' standard deviations.",
)
GAP = Quantity(
    "soft_hard_gap",
    "Soft-to-hard gap",
    "RMS gap (σ)",
    "RMS distance between the soft weights that are trained and the hard ones kept.",
)


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the run at a place in the order."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index // len(_COLOURS) % len(_LINES)],
        "linewidth": 1.8,
        "markersize": 4.5,
    }


def has_curve(runs: Sequence[ComparedRun], quantity: Quantity, against: str) -> bool:
    """Whether any run has logged the quantity together with `against`."""
    return any(_curve(each.run, quantity, against)[0] for each in runs)


def draw_curves(
    axes: "Axes", runs: Sequence[ComparedRun], quantity: Quantity, against: str = "step"
) -> None:
    """One line per run: the quantity against "step", "tokens" or "seconds"."""
    divisor, x_label = _axis(runs, quantity, against)
    shown: list[float] = []
    starts: list[float] = []
    for index, each in enumerate(runs):
        x, y = _curve(each.run, quantity, against)
        if not x:
            continue
        every = max(1, round(len(x) / _MARKS_ON_A_LINE))
        axes.plot(
            [value / divisor for value in x],
            y,
            **line_style(index),
            markevery=(index * every // len(runs), every),
            label=each.name,
        )
        shown += y
        starts.append(y[0])
    _scale(axes, shown, max(starts, default=0.0) if quantity.falls else None)
    axes.set_title(quantity.title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(quantity.unit)


def draw_intervals(
    axes: "Axes", runs: Sequence[ComparedRun], comparisons: Sequence[Comparison]
) -> None:
    """Mean and interval of every comparison, one below the other, in the colours of the runs."""
    places = {each.name: index for index, each in enumerate(runs)}
    for row, c in enumerate(comparisons):
        style = line_style(places[c.a]) | {"linestyle": "none", "markersize": 7}
        axes.errorbar(c.mean, row, xerr=[[c.mean - c.low], [c.high - c.mean]], capsize=4, **style)
    axes.axvline(0, color=GREY, linewidth=1.2)
    axes.set_yticks(range(len(comparisons)), [c.a for c in comparisons])
    axes.set_ylim(len(comparisons) - 0.4, -0.6)
    axes.grid(False, axis="y")
    metric = metric_label(comparisons[0].metric)
    axes.set_title(f"Difference of {metric} to the first run")
    axes.set_xlabel(f"{metric} (nats per token), 95% interval; lower is better")


def draw_swatch(axes: "Axes", index: int) -> None:
    """The line and the marker of a run, as a legend shows them."""
    style = line_style(index) | {"linewidth": 2.2, "markersize": 6}
    axes.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], **style)
    axes.set(xlim=(0, 1), ylim=(-1, 1))
    axes.axis("off")


def _curve(run: Run, quantity: Quantity, against: str) -> tuple[list[float], list[float]]:
    x, y = run.curve(quantity.key, against)
    y = [quantity.scale * value for value in y]
    return x, running_mean(y, max(1, len(y) // 20)) if quantity.smooth else y


def _axis(runs: Sequence[ComparedRun], quantity: Quantity, against: str) -> tuple[float, str]:
    """What the horizontal values are divided by, and the axis's label."""
    largest = max((x for each in runs for x in _curve(each.run, quantity, against)[0]), default=0.0)
    for least, divisor, unit in _UNITS[against]:
        if largest >= least:
            return divisor, unit
    return 1.0, against


def _scale(axes: "Axes", shown: Sequence[float], start: float | None) -> None:
    """A logarithmic vertical axis where the values span much, else a linear one.

    With a `start`, values far above it are cut off; without, a linear axis begins at 0.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    largest = max(shown, default=0.0)
    cut = start is not None and largest > _CUT_OFF_ABOVE * start
    inside = [y for y in shown if y <= _CUT_AT * start] if start is not None and cut else shown
    low, high = min(inside, default=0.0), max(inside, default=0.0)
    margin = 0.05 * (high - low)
    if low > 0 and high > _LOGARITHMIC_FROM * low:
        axes.set_yscale("log")
        low = max(low, high / _LARGEST_SPAN)
        axes.set_ylim(low / 1.2, 1.2 * high)
        fine = high / low < _LOGARITHMIC_FROM**2
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if fine else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif start is None:
        axes.set_ylim(bottom=0)
    elif cut:
        axes.set_ylim(low - margin, high + margin)
    if cut:
        words = f"cut off: rises to {largest:.3g}"
        axes.text(0.99, 0.98, words, transform=axes.transAxes, ha="right", va="top", fontsize=8)
