"""Plots of docs/results.md from the JSON lines of the experiments.

    python benchmarks/results_plots.py docs/results.png --overshoot docs/results/*-claims.jsonl.xz \
        --models docs/results/*-models.jsonl.xz

One panel for each: the hard code's divergence on held-out text along the trajectory, and the
divergence on the test text against the seconds of training, from the start that a run had.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from results_tables import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"1.0": "tab:red", "0.3": "tab:orange", "0.1": "tab:blue"}
KL_TICKS = (0.35, 0.4, 0.5, 0.6, 0.8, 1.0, 1.4)
STYLES = ("-", "--", ":")
MARKERS = {
    "identity": ("o", "tab:blue"),
    "soft": ("^", "tab:orange"),
    "through": ("s", "tab:green"),
    "scalar": ("x", "tab:red"),
    "native": ("+", "tab:purple"),
}


def kind_of(record: dict[str, Any]) -> str | None:
    """Which of ``MARKERS`` a run is, by its name, or else by its estimator."""
    if not record.get("log"):
        return None
    estimators = {kind: f"--estimator {kind} " for kind in ("identity", "soft")}
    by_name = (kind for kind in MARKERS if kind in record["name"])
    by_train = (kind for kind, option in estimators.items() if option in record["train"])
    return next(itertools.chain(by_name, by_train), None)


def overshoot(ax: Axes, records: list[dict[str, Any]]) -> None:
    """Runs named overshoot/LAYER/T: divergence of the hard code while the temperature falls."""
    layers = sorted({int(record["name"].split("/")[1]) for record in records})
    for record in sorted(records, key=lambda r: int(r["name"].split("/")[1])):
        _, layer, start = record["name"].split("/")
        log = [entry for entry in record["log"] if "heldout_kl_hard" in entry]
        steps = [0, *(entry["step"] + 1 for entry in log)]
        values = [record["log"][0]["heldout_kl_start"], *(e["heldout_kl_hard"] for e in log)]
        style = STYLES[layers.index(int(layer))]
        ax.plot(steps, values, style, color=COLORS[start], label=f"layer {layer}, from T = {start}")
    ax.set(yscale="log", xlabel="step", ylabel="held-out KL of the hard code, nats per token")
    ax.set_title("High temperatures overshoot")
    ax.legend(fontsize=8)


def models(ax: Axes, records: list[dict[str, Any]]) -> None:
    """Runs of whole models: divergence against the seconds of training."""
    for kind, (marker, color) in MARKERS.items():
        chosen = [record for record in records if kind_of(record) == kind]
        for tuned in (False, True):
            part = [r for r in chosen if r["name"].startswith("tuned") == tuned]
            seconds, kl = [r["log"][-1]["seconds"] for r in part], [r["kl"] for r in part]
            if part:
                label = f"{kind}, from tuned PTQ (its time on top)" if tuned else kind
                fill = "none" if tuned else color
                ax.plot(seconds, kl, marker, color=color, markerfacecolor=fill, label=label)
    for record in {r["name"]: r for r in records}.values():
        if not record.get("log"):
            ax.axhline(record["kl"], color="0.8", linewidth=0.8, zorder=0)
            ax.text(0.99, record["kl"], record["name"], fontsize=7, color="0.4", ha="right",
                    va="bottom", transform=ax.get_yaxis_transform())  # fmt: skip
    ax.set(xlabel="seconds of training", ylabel="KL on WikiText-2, nats per token", yscale="log")
    ax.set_yticks(KL_TICKS, [f"{kl:g}" for kl in KL_TICKS])
    ax.minorticks_off()
    ax.set_xlim(left=0)
    ax.set_title("Whole models; lines are PTQ alone")
    ax.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--overshoot", type=Path, nargs="+", default=[])
    parser.add_argument("--models", type=Path, nargs="+", default=[])
    options = parser.parse_args()
    panels = [(overshoot, options.overshoot, "overshoot/"), (models, options.models, "")]
    panels = [panel for panel in panels if panel[1]]
    _, axes = plt.subplots(
        1, len(panels), figsize=(6.4 * len(panels), 4.4), squeeze=False, layout="constrained"
    )
    for ax, (draw, paths, prefix) in zip(axes[0], panels, strict=True):
        draw(ax, [record for seeds in read(paths, prefix).values() for record in seeds])
    plt.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
