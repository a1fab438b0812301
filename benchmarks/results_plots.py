"""The plot of whole models of docs/results.md from the JSON lines of the experiments.

    python benchmarks/results_plots.py docs/results.png docs/results/*-models.jsonl.xz

Divergence on the test text against the seconds of training, from the start that a run had.
``claims_plots.py`` plots the runs of single layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
from layer_runs import options_of
from matplotlib import pyplot as plt
from results_tables import Record, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KL_TICKS = (0.35, 0.4, 0.5, 0.6, 0.8, 1.0, 1.4)
LABELS = {
    "straight_through": "straight-through",
    "mixed": "mixed gradients",
    "scalar": "scalar, same basis",
    "native": "scalar, native basis",
}
MARKERS = {
    "identity": ("o", "tab:blue"),
    "soft": ("^", "tab:orange"),
    "straight_through": ("s", "tab:green"),
    "mixed": ("D", "tab:brown"),
    "scalar": ("x", "tab:red"),
    "native": ("+", "tab:purple"),
}
VARIANTS = {
    "": "",
    "teacher": ", half of the text the teacher's",
    "tuned": ", from tuned PTQ (its time on top)",
}


def variant_of(record: Record) -> str:
    """Which of ``VARIANTS`` a run is; the first mixture's text was joined by hand."""
    if "tuned" in record["name"]:
        return "tuned"
    written = record.get("training_text", {}).get("teacher", record["name"].startswith("mixed/"))
    return "teacher" if written else ""


def kind_of(record: Record) -> str | None:
    """Which of ``MARKERS`` a run is, by its code's name, or else by its estimator.

    None of PTQ, of runs that only compile, and of those of two estimators.
    """
    passing = record["name"].startswith("warm") or "/then-" in record["name"]
    if passing or not record.get("log"):
        return None
    codes = (kind for kind in ("scalar", "native") if kind in record["name"])
    return next(codes, None) or options_of(record["train"]).get("estimator", "identity")


def models(ax: Axes, records: list[Record]) -> None:
    """Runs of whole models: divergence against the seconds of training."""
    for kind, (marker, color) in MARKERS.items():
        chosen = [record for record in records if kind_of(record) == kind]
        for variant, words in VARIANTS.items():
            part = [r for r in chosen if variant_of(r) == variant]
            seconds, kl = [r["log"][-1]["seconds"] for r in part], [r["kl"] for r in part]
            if part:
                star, fill = variant == "teacher", "none" if variant == "tuned" else color
                ax.plot(seconds, kl, "*" if star else marker, markersize=12 if star else None,
                        color=color, markerfacecolor=fill,
                        label=LABELS.get(kind, kind) + words)  # fmt: skip
    for record in {r["name"]: r for r in records}.values():
        if not record.get("log") and "/" not in record["name"]:
            ax.axhline(record["kl"], color="0.8", linewidth=0.8, zorder=0)
            ax.text(0.99, record["kl"], record["name"], fontsize=7, color="0.4", ha="right",
                    va="bottom", transform=ax.get_yaxis_transform())  # fmt: skip
    ax.set(xlabel="seconds of training", ylabel="KL on WikiText-2, nats per token", yscale="log")
    ax.set_yticks(KL_TICKS, [f"{kl:g}" for kl in KL_TICKS])
    ax.minorticks_off()
    ax.set_xlim(left=0)
    ax.set_title("Whole models; lines are PTQ alone")
    ax.legend(fontsize=8)


def draw(records: list[Record], picture: Path) -> None:
    """The one panel, of the runs that were scored on all of the test text."""
    records = [record for record in records if "windows" in record]
    most = max(len(record["windows"]["kl"]) for record in records)
    records = [record for record in records if len(record["windows"]["kl"]) == most]
    figure, ax = plt.subplots(figsize=(8.6, 5.6), layout="constrained")
    models(ax, records)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def command(description: str | None, draw: Callable[[list[Record], Path], None]) -> None:
    """A command of a picture and the files that it is made of."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    draw(read_records(options.files), options.picture)


if __name__ == "__main__":
    command(__doc__, draw)
