"""Rows 1 to 4 of docs/results.md against the runs that they are made of."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import claims_plots
import pytest
import results_plots
import torch
from claims import settings
from layer_runs import (
    best_rate,
    changes,
    escape_curve,
    moved,
    unions,
    wilson,
)
from results_page import DATA, PAGE, Run
from results_tables import over_seeds, per_token, read, read_records

from softtrellis.evaluation.divergence import paired_bootstrap

VITERBI = "349811a", "2d1d18d", "476d123", "96fc7dc"
"""The commits of the claims from plain Viterbi."""


def claims(*commits: str) -> list[Run]:
    return read_records([DATA / f"{commit}-claims.jsonl.xz" for commit in commits])


def test_the_table_of_unions() -> None:
    named = [DATA / f"{name}-claims.jsonl.xz" for name in ("fba8764", "a5ef0bd", "0ffec44")]
    first, old, new = (read([path], "") for path in named)
    for kind, single in (("soft", "soft-0.1"), ("identity", "identity")):
        parts = {
            "4": (first["single/4/ldlq"], new[f"single/4/ldlq/{single}"]),
            "12": (old["single/12/ldlq"], old[f"single/12/ldlq/{single}"]),
            "20": (first["pairs/20"], old[f"pairs/20/{kind}"]),
        }
        for layers in ("4,12", "4,20", "12,20", "4,12,20"):
            union = old | new
            before, tokens = per_token(union[f"pairs/{layers}"], "nll")
            gain = before - per_token(union[f"pairs/{layers}/{kind}"], "nll")[0]
            total = torch.zeros_like(gain)
            for layer in layers.split(","):
                a, b = (per_token(run, "nll")[0] for run in parts[layer])
                total += a - b
            more = paired_bootstrap(gain, total, tokens)
            assert f"{more.mean:+.4f} ({more.low:+.4f} to {more.high:+.4f})" in PAGE


def test_claims_by_their_options_are_those_of_the_page() -> None:
    records = claims("0ffec44", "a5ef0bd", "fba8764")
    found = unions(records)
    assert len(found) == 8  # four sets, two estimators
    for union in found:
        assert f"{union.more.mean:+.4f} ({union.more.low:+.4f} to {union.more.high:+.4f})" in PAGE
        assert union.seeds[0] == pytest.approx(union.gain - union.total)
    ldlq = [
        c for c in changes(records) if c.setting.start == "ldlq" and c.setting.kind == "soft-0.1"
    ]
    singles = {c.setting.layers[0]: c for c in ldlq if len(c.setting.layers) == 1}
    assert singles.keys() == {4, 12, 20}
    for change in singles.values():
        assert f"{change.other:.4f} | " in PAGE
        assert f"{change.windows.mean:+.4f} ({change.windows.low:+.4f}" in PAGE


@pytest.mark.parametrize("against", [None, "identity"])
def test_single_layers_from_plain_viterbi_are_those_of_the_page(against: str | None) -> None:
    trained = [c for c in changes(claims("349811a"), against) if c.setting.trainable != "latents"]
    assert len(trained) == (9 if against else 12)
    for change in trained:
        assert (change.rates, sorted(change.seeds)) == (2, [0, 1, 2])
        interval = over_seeds(change.seeds)
        assert f"{interval.mean:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})" in PAGE
        assert f"{change.kl:.4f}" in PAGE
        assert f"{change.other:.4f}" in PAGE


def test_the_papers_own_recipe_changes_nothing() -> None:
    own = [c for c in changes(claims("349811a")) if c.setting.trainable == "latents"]
    assert [(c.setting.steps, c.lr) for c in own] == [(10, 2e-4)] * 6
    assert [c.windows.mean for c in own] == [0.0] * 6


def test_what_plain_viterbi_loses_compounds() -> None:
    runs = [run for run in claims(*VITERBI) if "kl" in run]
    losses = {(run["name"], run["seed"]): math.log(run["perplexity"] / 21.64) for run in runs}
    page = " ".join(PAGE.split())
    ptq, identity, soft = "", "/identity@0.01", "/soft-0.3@0.03"
    shares: list[str] = []
    later = "{} for {} and", "and {} for {},"
    for setting, first, second in (
        (ptq, "is {} for the three layers, and {} for the sum", "PTQ"),
        (identity, "After identity it is {} and {},", "after identity"),
        (soft, "after soft {} and {}:", "after soft"),
    ):
        words = first, f"{second} {later[0]}", later[1]
        for seed, each in enumerate(words):
            union = losses[f"pairs/4,12,20/viterbi{setting}", seed]
            total = sum(losses[f"single/{layer}/viterbi{setting}", seed] for layer in (4, 12, 20))
            assert union > total or (setting, seed) == (soft, 2)
            assert each.format(f"{union:.4f}", f"{total:.4f}") in page
            assert setting or f"{union - total:.4f}" in page
            shares.append(f"{100 * (union / total - 1):.0f}%")
    ptq_1, ptq_2 = shares[1:3]
    assert shares[0] == "5%"
    assert f"PTQ's loss is {ptq_1} and {ptq_2} more than the sum in seeds 1 and 2" in page
    assert "identity's {1} and {2}, soft's {4} and {5}.".format(*shares[3:]) in page


def test_latents_alone_have_nearly_all_of_it() -> None:
    runs = {run["name"]: run["kl"] for run in claims(*VITERBI) if run["seed"] == 0 and "kl" in run}
    for layer, setting, words in (
        (4, "soft-0.3@0.03", "T = 0.3 {} for {} with scales and norms"),
        (4, "soft-0.1@0.1", "0.1 {} for {};"),
        (12, "soft-0.1@0.1", "0.1 {} for {}."),
    ):
        alone = runs[f"overshoot-latents/{layer}/viterbi/{setting}"]
        more = runs[f"single/{layer}/viterbi/{setting}"]
        assert more < alone < runs[f"single/{layer}/viterbi/identity@0.01"]
        assert words.format(f"{alone:.4f}", f"{more:.4f}") in PAGE


def test_three_layers_from_plain_viterbi_in_three_seeds() -> None:
    runs = claims(*VITERBI)
    found = {u.setting.kind: u for u in unions(runs) if len(u.setting.layers) == 3}
    soft, identity = (found[kind] for kind in ("soft-0.3", "identity"))
    words, cells = [], []
    for union in (soft, identity):
        assert sorted(union.seeds) == [0, 1, 2]
        more, over = union.more, over_seeds(union.seeds)
        words.append(f"**{more.mean:+.4f} ({more.low:+.4f} to {more.high:+.4f})**")
        cells.append(f"{over.low:+.4f} to {over.high:+.4f}")
    together = [
        [run["kl"] for run in runs if run["name"] == f"pairs/4,12,20/viterbi{own}"]
        for own in ("", "/identity@0.01", "/soft-0.3@0.03")
    ]
    means = [f"{statistics.mean(each):.4f}" for each in together]
    row = [*means, f"{soft.gain:.4f}", f"{soft.total:.4f}", *words]
    assert f"| mean of three seeds | {' | '.join(row)} |" in PAGE
    assert f"| over seeds | | | | | | {' | '.join(cells)} |" in PAGE
    gains = [f"{union.seeds[seed]:.4f}" for union in (identity, soft) for seed in (1, 2)]
    assert "gains are {} and {} (identity) and {} and {} (soft) more".format(*gains) in PAGE


def test_the_grid_of_drifts() -> None:
    runs = {(str(m.setting.kind), m.lr, m.setting.steps): m for m in moved(claims("fba8764"))}
    assert len(runs) == 28
    for run in (runs["identity", 0.01, 40], runs["soft-0.1", 1e-5, 40]):
        assert run.changed == run.predicted == 0  # 0.428 in states
    known = {("identity", 0.1, 40): "0.98 | 1 | 1", ("soft-0.1", 0.1, 40): "0.030 | 0 | 1"}
    for key, cells in known.items():
        run, (share, predicted, agreeing) = runs[key], cells.split(" | ")
        assert f"{run.changed:.{len(share) - 2}f}" == share
        assert (run.predicted, run.agreeing) == (float(predicted), float(agreeing))
        assert cells in PAGE
    distances, shares = escape_curve(claims("fba8764"), "random")
    assert shares == sorted(shares)
    assert distances == sorted(distances)


def test_a_grid_with_radii_of_every_linear_layer() -> None:
    train = "--estimator identity --lr 0.1 --steps 2 --train latents"
    layers = {"q": {"drift": 0.1, "changed_tiles": 0.5}, "k": {"drift": 0.3, "changed_tiles": 1}}
    run = {
        "name": "drift-latents/4/ldlq/identity@0.1/2",
        "quantize": "--layers 4",
        "train": train,
        "seed": 0,
        "windows": {},
        "heldout": {"kl": [1, 2], "tokens": [3, 3]},
        "log": [{}, {"drift": 0.2, "changed_tiles": 0.625, "by_layer": layers}],
    }
    radii = {
        "name": "drift-latents/4/ldlq/radii",
        "seed": 0,
        "paper": 0.01,
        "tiles": {"q": 30, "k": 10},
        "radii": {"q": {"random": [0.05, 0.2]}, "k": {"random": [0.1, 0.2]}},
    }
    (found,) = moved([run, radii])
    assert found.layers == {"q": (0.1, 0.5, 0.5), "k": (0.3, 1, 1)}
    assert (found.predicted, found.tiles, found.heldout) == (0.625, 40, 0.5)
    assert found.agreeing == 0  # two steps of warm-up lead no further than 0.02
    assert escape_curve([radii], "random") == ([0.05, 0.1, 0.2, 0.2], [0.375, 0.5, 0.625, 1])
    low, high = wilson(0.625, 40)
    assert (low, high) == pytest.approx((0.4703, 0.7578), abs=1e-4)


def test_rates_are_chosen_on_held_out_text() -> None:
    def seeds(*kl: float) -> dict[int, Run]:
        return {seed: {"heldout": {"kl": [x], "tokens": [1]}} for seed, x in enumerate(kl)}

    assert best_rate({0.1: seeds(0.3, 0.3), 0.2: seeds(0.2, 0.5), 0.3: seeds(0.35)}) == 0.2
    assert best_rate({0.1: seeds(0.3, 0.3), 0.2: seeds(0.2, 0.5)}) == 0.1
    with pytest.raises(ValueError, match="no seed"):
        best_rate({0.1: {0: {}}, 0.2: {0: {}}})


def test_plots_are_made_of_the_data(tmp_path: Path) -> None:
    claims_plots.draw(claims("0ffec44", "a5ef0bd", "fba8764"), tmp_path / "claims.png")
    models = read([DATA / "b560f7f-models.jsonl.xz"], "")
    results_plots.draw([run for seeds in models.values() for run in seeds], tmp_path / "models.png")
    for name in ("claims", "models"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_settings_of_claims() -> None:
    found = list(settings(["identity@1e-2", "soft-0.3@6e-2,1e-1"]))
    assert [name for name, _ in found] == ["identity@0.01", "soft-0.3@0.06", "soft-0.3@0.1"]
    assert found[1][1] == "--estimator soft --t-init 0.3 --t-min 0.03 --start 0 --lr 0.06"
