"""Plots of rows 1 to 4 of docs/results.md from the JSON lines of ``claims.py``.

    python benchmarks/claims_plots.py docs/claims.png docs/results/*-claims.jsonl.xz

Panels of each claim, one for each of what training changed; of single layers with several seeds
another one, beside identity STE. Bars have 95% intervals over windows of the test text (paired
bootstrap), and a black dot for every seed where there are several. Shares of changed tiles have the
least and the greatest of the linear layers, where these were recorded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
import torch
from layer_runs import (
    Change,
    Moved,
    Setting,
    Union,
    changes,
    claim_of,
    escape_curve,
    moved,
    setting_of,
    trajectories,
    unions,
)
from matplotlib import pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator
from results_plots import command
from results_tables import Record, over_tokens

from softtrellis.evaluation.divergence import paired_bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "identity": "tab:gray",
    "soft-0.1": "tab:blue",
    "soft-0.3": "tab:orange",
    "soft-1.0": "tab:red",
}
STYLES = ("-", "--", ":", "-.")
LEAST_DRIFT = 5e-4
FEW = 200
"""Points of a curve that are shown, since it is not known between them."""
STARTS = {"ldlq": "LDLQ", "viterbi": "plain Viterbi"}
Panel = tuple[Callable[["Axes", Any], None], Any]


def label_of(kind: str | None) -> str:
    """Of an estimator, with the temperature that BCJR starts from."""
    estimator, _, t_init = str(kind).partition("-")
    return f"{estimator} from T = {t_init}" if t_init else estimator


def order_of(setting: Setting) -> tuple[bool, int, tuple[int, ...]]:
    """Plain Viterbi first, few layers before many."""
    return setting.start == "ldlq", len(setting.layers), setting.layers


def bars(ax: Axes, found: Sequence[tuple[Setting, Any, dict[int, float]]]) -> None:
    """A group for every start and set of layers, in it a bar for every estimator."""
    groups = sorted({order_of(setting) for setting, _, _ in found})
    kinds = sorted({str(setting.kind) for setting, _, _ in found})
    width = 0.8 / len(kinds)
    for kind in kinds:
        color, offset = COLORS.get(kind), (kinds.index(kind) - (len(kinds) - 1) / 2) * width
        label: str | None = label_of(kind)
        for setting, interval, seeds in found:
            if setting.kind != kind:
                continue
            x = groups.index(order_of(setting)) + offset
            ends = [[interval.mean - interval.low], [interval.high - interval.mean]]
            ax.bar(x, interval.mean, width, color=color, label=label)
            ax.errorbar(x, interval.mean, yerr=ends, color="black", capsize=2, linewidth=1)
            if len(seeds) > 1:
                ax.plot([x] * len(seeds), list(seeds.values()), "k.", markersize=4)
            label = None
    names = ["+".join(map(str, layers)) + ("\nLDLQ" if ldlq else "\nViterbi")
             for ldlq, _, layers in groups]  # fmt: skip
    ax.set_xticks(range(len(names)), names, fontsize=8 if len(names) < 10 else 7)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.legend(fontsize=8)


def single(ax: Axes, found: Sequence[Change]) -> None:
    """What training does to single layers."""
    bars(ax, [(c.setting, c.windows, c.seeds) for c in found])
    ends = [end for c in found for end in (c.windows.low, c.windows.high, *c.seeds.values())]
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set_ylim(min(-1e-3, 3 * min(ends)), max(1e-3, 3 * max(ends)))
    ax.set(ylabel="KL minus PTQ's, nats per token\n(linear within ±0.001)")
    ax.set_xlabel("decoder layer, and the PTQ that training starts from")
    ax.set_title(f"1. Single layers, {trained(found[0].setting)}")


def beyond(ax: Axes, found: Sequence[Change]) -> None:
    """What training of single layers by BCJR does beyond identity STE."""
    bars(ax, [(c.setting, c.windows, c.seeds) for c in found])
    ax.set(ylabel="KL minus identity's, nats per token")
    ax.set_xlabel("decoder layer, and the PTQ that training starts from")
    ax.set_title(f"1. BCJR beyond identity STE, {trained(found[0].setting)}")


def pairs(ax: Axes, found: Sequence[Union]) -> None:
    """What layers gain together beyond the sum of their single gains."""
    bars(ax, [(u.setting, u.more, u.seeds) for u in found])
    ax.set(ylabel="gain minus sum of single gains,\nnats of log loss per token")
    ax.set_xlabel("decoder layers, and the PTQ that training starts from")
    ax.set_title(f"2. Do gains add up? {trained(found[0].setting).capitalize()}")


def drift(ax: Axes, found: tuple[list[Moved], list[Record]]) -> None:
    """Share of changed tiles by drift, beside what radii predict."""
    runs, records = found
    for ray, style in (("random", "-"), ("soft", "--")):
        name = "random directions" if ray == "random" else "the soft gradient's signs"
        distances, below = escape_curve(records, ray)
        marker = "." if len(distances) < FEW else ""
        ax.plot(distances, below, style, marker=marker, color="0.5", label=f"predicted: {name}")
    for kind in sorted({str(run.setting.kind) for run in runs}):
        own = [run for run in runs if run.setting.kind == kind and run.drift > LEAST_DRIFT]
        shares = [[changed for _, changed, _ in run.layers.values()] or [run.changed]
                  for run in own]  # fmt: skip
        low = [run.changed - min(share) for run, share in zip(own, shares, strict=True)]
        high = [max(share) - run.changed for run, share in zip(own, shares, strict=True)]
        ax.errorbar(
            [run.drift for run in own], [run.changed for run in own], yerr=[low, high],
            fmt="o" if kind == "identity" else "^", color=COLORS.get(kind), label=label_of(kind),
            capsize=2, linewidth=1, markersize=5, clip_on=False, zorder=3,
        )  # fmt: skip
    ax.axvline(runs[0].paper, ymax=0.68, color="tab:green", linewidth=1, label="the paper's radius")
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set_xlim(LEAST_DRIFT, 1)
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 1e-3, 1e-2, 1e-1, 1], ["0", "0.001", "0.01", "0.1", "1"])
    ax.set(xlabel="drift of latents, root mean square, sigma")
    ax.set_ylabel("share of tiles that changed\n(linear below 0.001)")
    setting = runs[0].setting
    layers = "+".join(map(str, setting.layers))
    ax.set_title(f"3. Drift, layer {layers} from {STARTS[setting.start]}, {trained(setting)}")
    ax.legend(fontsize=8, loc="upper left")


Lines = list[tuple[Setting, Record, str]]
"""Runs, each with the style of its layers."""


def overshoot(ax: Axes, found: Lines) -> None:
    """Divergence of the hard code on held-out text while the temperature falls."""
    for setting, record, style, label in drawn(found):
        log = [entry for entry in record["log"] if "heldout_kl_hard" in entry]
        steps = [0, *(entry["step"] + 1 for entry in log)]
        values = [record["log"][0]["heldout_kl_start"], *(e["heldout_kl_hard"] for e in log)]
        ax.plot(steps, values, style, color=COLORS.get(str(setting.kind)), label=label)
    ax.set(yscale="log", xlabel="step", ylabel="held-out KL of the hard code,\nnats per token")
    finish(ax, found)


def tested(ax: Axes, found: Lines) -> None:
    """Perplexity of the hard code on the test text, with the paired interval from the start's."""
    for setting, record, style, label in drawn(found):
        color = COLORS.get(str(setting.kind))
        log = [entry for entry in record["log"] if "test" in entry]
        start = record["log"][0]["test_start"]
        tokens = torch.tensor(start["tokens"], dtype=torch.float64)
        before = torch.tensor(start["nll"], dtype=torch.float64) / tokens
        level = float(over_tokens(before, tokens))
        ends = [(0.0, 0.0, 0.0)]
        for entry in log:
            after = torch.tensor(entry["test"]["nll"], dtype=torch.float64) / tokens
            interval = paired_bootstrap(after, before, tokens)
            ends.append((interval.mean, interval.low, interval.high))
        mean, low, high = (level + torch.tensor(ends, dtype=torch.float64)).exp().T.tolist()
        steps = [0, *(entry["step"] + 1 for entry in log)]
        ax.plot(steps, mean, style, color=color, label=label)
        ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    ax.set(yscale="log", xlabel="step", ylabel="perplexity of the hard code, test text")
    finish(ax, found)


def drawn(found: Lines) -> list[tuple[Setting, Record, str, str | None]]:
    """Runs in order, with the label of a setting's first seed."""
    named: set[Setting] = set()
    drawn = []
    for setting, record, style in sorted(found, key=lambda x: (x[0].layers, str(x[0].kind))):
        numbers = "+".join(map(str, setting.layers))
        label = None if setting in named else f"layer {numbers}, {label_of(setting.kind)}"
        named.add(setting)
        drawn.append((setting, record, style, label))
    return drawn


def finish(ax: Axes, found: Lines) -> None:
    setting = found[0][0]
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_title(f"4. Trajectories from {STARTS[setting.start]}, {trained(setting)}")
    ax.legend(fontsize=7)


def trained(setting: Setting) -> str:
    """What training changed, in words."""
    return f"{setting.trainable} trained".replace(",", ", ")


def split(found: Sequence[Any], *keys: str) -> list[list[Any]]:
    """Results by what training changed, and by other attributes of their settings."""
    parts: dict[Any, list[Any]] = defaultdict(list)
    for one in found:
        setting = one[0] if isinstance(one, tuple) else one.setting
        parts[str(setting.trainable), *(getattr(setting, key) for key in keys)].append(one)
    return [parts[key] for key in sorted(parts)]


def radii_of(records: list[Record], setting: Setting) -> list[Record]:
    """What the radii of a setting's layers predict; fba8764 names none, and looked at one layer."""
    return [
        record
        for record in records
        if claim_of(record) == "drift"
        and ("quantize" not in record or setting_of(record).layers == setting.layers)
        and ("quantize" not in record or setting_of(record).start == setting.start)
    ]


def rows_of(records: list[Record]) -> list[list[Panel]]:
    """The panels of every claim that has runs."""
    layers, others = (
        [change for change in changes(records, against) if len(change.setting.layers) == 1]
        for against in (None, "identity")
    )
    confirmed = [change for change in others if len(change.seeds) > 1]
    runs = trajectories(records)
    numbers = sorted({setting.layers for setting in runs})
    lines = [(setting, record, STYLES[numbers.index(setting.layers) % len(STYLES)])
             for setting, seeds in runs.items() for record in seeds]  # fmt: skip
    scored = [line for line in lines if "test_start" in line[1]["log"][0]]
    rows: list[list[Panel]] = [
        [(single, part) for part in split(layers)],
        [(beyond, part) for part in split(confirmed)],
        [(pairs, part) for part in split(unions(records))],
        [
            (drift, (part, radii_of(records, part[0].setting)))
            for part in split(moved(records), "layers", "start")
        ],
        [(overshoot, part) for part in split(lines, "start")],
        [(tested, part) for part in split(scored, "start")],
    ]
    return [row for row in rows if row]


def draw(records: list[Record], picture: Path) -> None:
    """All rows, two panels beside each other."""
    panels = [panel for row in rows_of(records) for panel in row]
    height = (len(panels) + 1) // 2
    figure, axes = plt.subplots(
        height, 2, figsize=(13, 4.4 * height), squeeze=False, layout="constrained"
    )
    for ax, (make, found) in zip(axes.flat, panels, strict=False):
        make(ax, found)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    command(__doc__, draw)
