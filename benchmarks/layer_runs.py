"""What the runs of ``claims.py`` say, from its JSON lines: for tables and plots.

Of several learning rates the one with the least divergence on held-out text counts, mean of the
seeds that all of them have. Intervals are of 95%: over windows of the test text (paired bootstrap,
seeds averaged window by window) and, with several seeds, over these (t, paired by seed).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from results_tables import Record, by_seed, difference, over_tokens, per_token
from torch import Tensor

from softtrellis.evaluation.divergence import Interval, paired_bootstrap
from softtrellis.recipes.drift import drift_budget, learning_rates

CLAIMS = ("single", "pairs", "drift", "overshoot")
UNSAID = {"fba8764": "latents", "a5ef0bd": "latents,scales,norms"}
"""What training changed, by commit, before runs named it."""

Seeds = dict[int, Record]


@dataclass(frozen=True)
class Setting:
    """What was run, but for learning rate and seed.

    Attributes:
        trainable: what training changed; None of PTQ, as the two below.
        kind: estimator, and for BCJR the temperature that it starts from.
    """

    layers: tuple[int, ...]
    start: str
    trainable: str | None
    kind: str | None
    steps: int | None


def claim_of(record: Record) -> str | None:
    """The claim that a record is of, by the first word of its name; None of a whole model."""
    first: str = record["name"].partition("/")[0].partition("-")[0]
    return first if first in CLAIMS and "/" in record["name"] else None


def options_of(text: str) -> dict[str, str]:
    """A command line's options by name."""
    found: dict[str, str] = {}
    name = ""
    for word in text.split():
        if word.startswith("--"):
            name = word.removeprefix("--")
            found[name] = ""
        else:
            found[name] = word
    return found


def setting_of(record: Record) -> Setting:
    """By the options of a run of some layers."""
    quantize = options_of(record["quantize"])
    layers = tuple(map(int, quantize["layers"].split(",")))
    start = "viterbi" if "no-hessian" in quantize else "ldlq"
    if not record.get("train"):
        return Setting(layers, start, None, None, None)
    train = options_of(record["train"])
    trainable = train["train"] if "train" in train else UNSAID[record["commit"]]
    kind = train["estimator"] + (f"-{train['t-init']}" if "t-init" in train else "")
    return Setting(layers, start, trainable, kind, int(train["steps"]))


def rate_of(record: Record) -> float:
    return float(options_of(record["train"])["lr"])


def single_and_pairs(records: Iterable[Record]) -> dict[Setting, dict[float, Seeds]]:
    """Runs of the claims single and pairs, which are the same where layers are, by learning rate.

    PTQ has the rate 0. Of runs that were made again, those scored on held-out windows count.
    """
    found: dict[Setting, dict[float, Seeds]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if claim_of(record) in ("single", "pairs") and "windows" in record:
            lr = rate_of(record) if record["train"] else 0.0
            seeds = found[setting_of(record)][lr]
            if record["seed"] not in seeds or "heldout" in record:
                seeds[record["seed"]] = record
    return found


def heldout(record: Record) -> float:
    """KL of a run's hard code on held-out windows, in nats per token."""
    return float(sum(record["heldout"]["kl"]) / sum(record["heldout"]["tokens"]))


def best_rate(rates: dict[float, Seeds]) -> float:
    """The one with the least divergence on held-out text; of one rate none needs to be known."""
    if len(rates) == 1:
        return next(iter(rates))
    scored = {
        lr: {seed for seed, record in seeds.items() if "heldout" in record}
        for lr, seeds in rates.items()
    }
    scored = {lr: seeds for lr, seeds in scored.items() if seeds}
    common = set.intersection(*scored.values()) if scored else set()
    if not common:
        raise ValueError(f"no seed has all learning rates {sorted(rates)}")
    return min(scored, key=lambda lr: sum(heldout(rates[lr][seed]) for seed in common))


@dataclass(frozen=True)
class Change:
    """What training of some layers did to the KL on the test text.

    Attributes:
        rates: how many learning rates were tried.
        kl: of the trained layers, mean of seeds; ``other`` what it is compared with.
        windows: their difference, in nats per token, over windows.
        seeds: the same by seed.
    """

    setting: Setting
    lr: float
    rates: int
    kl: float
    other: float
    windows: Interval
    seeds: dict[int, float]


def changes(records: Iterable[Record], against: str | None = None) -> list[Change]:
    """Every setting with its best rate, minus another estimator's with its own, or minus PTQ."""
    runs, found = single_and_pairs(records), []
    for setting, rates in runs.items():
        how = (setting.trainable, against, setting.steps) if against else (None, None, None)
        others = runs.get(Setting(setting.layers, setting.start, *how))
        if setting.kind in (None, against) or others is None:
            continue
        lr, other = best_rate(rates), others[best_rate(others)]
        common = sorted(rates[lr].keys() & other.keys())
        if not common:
            continue
        after, before = ([seeds[seed] for seed in common] for seeds in (rates[lr], other))
        kl, start = (statistics.mean(r["kl"] for r in part) for part in (after, before))
        window = difference(after, before, "kl")
        seeds = by_seed(after, before, "kl")
        found.append(Change(setting, lr, len(rates), kl, start, window, seeds))
    return sorted(found, key=lambda c: (c.setting.layers, c.setting.start, str(c.setting)))


@dataclass(frozen=True)
class Union:
    """What several layers gain together.

    Attributes:
        gain: fall of the log loss on the test text by training, in nats per token.
        total: the sum of what the layers gain one by one.
        more: their difference, over windows.
        seeds: the same by seed.
    """

    setting: Setting
    gain: float
    total: float
    more: Interval
    seeds: dict[int, float]


def unions(records: Iterable[Record]) -> list[Union]:
    """All sets of layers whose members were trained one by one, too: same rate, same seeds."""
    runs = single_and_pairs(records)
    found = []
    for setting in list(runs):
        if setting.kind is None or len(setting.layers) < 2:
            continue
        lr = best_rate(runs[setting])
        parts = [
            _gains(runs, Setting((layer,), setting.start, *_how(setting)), lr)
            for layer in setting.layers
        ]
        together = _gains(runs, setting, lr)
        common = sorted(set(together).intersection(*parts))
        if not common:
            continue
        gain = torch.stack([together[seed] for seed in common])
        total = torch.stack([sum((part[seed] for part in parts), 0 * gain[0]) for seed in common])
        tokens = next(iter(runs[setting].values()))[common[0]]["windows"]["tokens"]
        weight = torch.tensor(tokens, dtype=torch.float64)
        more = paired_bootstrap(gain.mean(0), total.mean(0), weight)
        seeds = dict(zip(common, over_tokens(gain - total, weight).tolist(), strict=True))
        own, parted = (float(over_tokens(x, weight).mean()) for x in (gain, total))
        found.append(Union(setting, own, parted, more, seeds))
    return sorted(found, key=lambda u: (str(u.setting.trainable), u.setting.start, str(u.setting)))


def _how(setting: Setting) -> tuple[str | None, str | None, int | None]:
    return setting.trainable, setting.kind, setting.steps


def _gains(
    runs: dict[Setting, dict[float, Seeds]], setting: Setting, lr: float
) -> dict[int, Tensor]:
    """By seed, float64 [windows]: fall of the log loss per token, with this rate."""
    ptq = runs.get(Setting(setting.layers, setting.start, None, None, None))
    if ptq is None or lr not in runs.get(setting, ()):
        return {}
    after = runs[setting][lr]
    return {
        seed: per_token([ptq[0.0][seed]], "nll")[0] - per_token([after[seed]], "nll")[0]
        for seed in after.keys() & ptq[0.0].keys()
    }


@dataclass(frozen=True)
class Moved:
    """A run of the grid of rates and steps: what its drift changed, and what was predicted.

    Attributes:
        drift: root mean square travel of latents, in sigma; ``paper`` is the paper's radius.
        changed: share of tiles whose code changed.
        predicted: share of tiles with a radius along a random direction below the drift.
        agreeing: the same of the travel of gradients that always agree.
        layers: by linear layer drift, changed and predicted; empty where they were not recorded.
        tiles: that were looked at; 0 where that was not recorded.
        heldout: KL of the hard code, in nats per token.
    """

    setting: Setting
    lr: float
    seed: int
    drift: float
    paper: float
    changed: float
    predicted: float
    agreeing: float
    layers: dict[str, tuple[float, float, float]]
    tiles: int
    heldout: float


def moved(records: Iterable[Record]) -> list[Moved]:
    """All runs of the claim drift, by their settings and rates.

    Of runs that were made again, those with figures of every linear layer count.
    """
    records = [record for record in records if claim_of(record) == "drift"]
    others = {(r["name"], r["seed"]): r for r in records if "windows" not in r}
    runs = [r for r in records if "windows" in r and r["train"]]
    found: dict[tuple[Setting, float, int], Moved] = {}
    for run in sorted(runs, key=lambda run: "by_layer" in run["log"][-1]):
        name, seed = run["name"], run["seed"]
        old = others.get((f"{name}/prediction", seed))
        if old is None:
            one = _by_layer(run, others["/".join([*name.split("/")[:3], "radii"]), seed])
        else:
            one = _predicted(run, old, _in_codewords(run, runs))
        found[one.setting, one.lr, seed] = one
    return sorted(found.values(), key=lambda m: (str(m.setting), m.lr, m.seed))


def _predicted(run: Record, old: Record, changed: float) -> Moved:
    """A run of fba8764, which has a record of what was predicted."""
    last, shares = run["log"][-1], old["shares"]
    return Moved(
        setting_of(run), rate_of(run), run["seed"], last["drift"], old["radius"], changed,
        shares["random/drift"], shares["random/consistent"], {}, 0, last["heldout_kl_hard"],
    )  # fmt: skip


def _by_layer(run: Record, radii: Record) -> Moved:
    last, lr, tiles = run["log"][-1], rate_of(run), radii["tiles"]
    agreed = drift_budget(learning_rates(lr, len(run["log"]))).consistent
    layers = {
        key: (layer["drift"], layer["changed_tiles"], _share(radii, key, layer["drift"]))
        for key, layer in last["by_layer"].items()
    }

    def mean(shares: dict[str, float]) -> float:
        total: float = sum(tiles[key] * share for key, share in shares.items())
        return total / float(sum(tiles.values()))

    return Moved(
        setting_of(run), lr, run["seed"], last["drift"], radii["paper"], last["changed_tiles"],
        mean({key: share for key, (_, _, share) in layers.items()}),
        mean({key: _share(radii, key, agreed) for key in layers}),
        layers, sum(tiles.values()), heldout(run),
    )  # fmt: skip


def _share(radii: Record, layer: str, distance: float, ray: str = "random") -> float:
    values: list[float] = radii["radii"][layer][ray]
    return sum(radius <= distance for radius in values) / len(values)


def _in_codewords(run: Record, runs: list[Record]) -> float:
    """Share of changed tiles of a run of fba8764, which counted states instead of codewords.

    Re-encoding exchanged many tiles for mirror images with the same codewords: as many as the run
    of as many steps counts in which latents hardly moved.
    """
    counted: float = run["log"][-1]["changed_tiles"]
    alike = [r for r in runs if len(r["log"]) == len(run["log"]) and r["commit"] == run["commit"]]
    base: float = min(alike, key=lambda r: r["log"][-1]["drift"])["log"][-1]["changed_tiles"]
    return (counted - base) / (1 - base)


def trajectories(records: Iterable[Record]) -> dict[Setting, list[Record]]:
    """Runs of the claim overshoot, all seeds, with the rate whose last code is the best.

    By its divergence on held-out text.
    """
    found: dict[Setting, dict[float, Seeds]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if claim_of(record) == "overshoot":
            seeds = found[setting_of(record)][rate_of(record)]
            if record["seed"] not in seeds or "heldout" in record:
                seeds[record["seed"]] = record

    def last(seeds: Seeds) -> float:
        return statistics.mean(float(r["log"][-1]["heldout_kl_hard"]) for r in seeds.values())

    return {setting: list(min(rates.values(), key=last).values())
            for setting, rates in found.items()}  # fmt: skip


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share of so many."""
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    whole = 1 + z * z / count
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def escape_curve(records: Iterable[Record], ray: str) -> tuple[list[float], list[float]]:
    """Distances in sigma and the share of tiles with a radius below, along a kind of direction.

    Of fba8764 only the distances are known that were asked for. Linear layers count by their tiles.
    """
    asked: dict[float, float] = {}
    radii: list[tuple[float, float]] = []
    for record in records:
        if "shares" in record:
            for kind in ("random", "consistent", "drift"):
                asked[record[kind]] = record["shares"][f"{ray}/{kind}"]
        for key, layer in record.get("radii", {}).items():
            weight = record["tiles"][key] / len(layer[ray])
            radii += [(radius, weight) for radius in layer[ray]]
    if not radii:
        return sorted(asked), [asked[distance] for distance in sorted(asked)]
    total = sum(weight for _, weight in radii)
    radii.sort()
    below = accumulate(weight for _, weight in radii)
    return [radius for radius, _ in radii], [weight / total for weight in below]
