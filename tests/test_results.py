"""docs/results.md and docs/results-history.md against the runs that they are made of."""

from __future__ import annotations

import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import claims_plots  # noqa: E402
import results_plots  # noqa: E402
from claims import settings  # noqa: E402
from layer_runs import (  # noqa: E402
    best_rate,
    changes,
    escape_curve,
    moved,
    unions,
    wilson,
)
from results_tables import (  # noqa: E402
    by_seed,
    check_seeds,
    difference,
    latest,
    over_seeds,
    per_token,
    read,
    read_records,
    rows,
    same_seeds,
)

from softtrellis.evaluation.divergence import paired_bootstrap  # noqa: E402

Run = dict[str, Any]

VITERBI = "349811a", "2d1d18d", "476d123", "96fc7dc"
"""The commits of the claims from plain Viterbi."""

DATA = ROOT / "docs" / "results"
PAGE = "".join(
    (ROOT / "docs" / name).read_text("utf-8") for name in ("results.md", "results-history.md")
)


def words(a: list[Run], b: list[Run], digits: int) -> str:
    """The difference of two runs' KL as the tables have it."""
    found = difference(a, b, "kl")
    return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def spread(runs: list[Run], key: str, digits: int) -> str:
    found = [run[key] for run in runs]
    return f"{statistics.mean(found):.{digits}f} ± {statistics.stdev(found):.{digits}f}"


def test_the_table_of_equal_tokens() -> None:
    runs = read(
        [DATA / f"{name}-models.jsonl.xz" for name in ("a5ef0bd", "0ffec44", "b560f7f")], ""
    )
    first = runs["tokens/identity-1.5e-2-start-0.5"]
    identity = [*first, *runs["tokens/identity"]]
    soft = [*runs["tokens/soft-1.5e-2-start-0.5"], *runs["tokens/soft"]]
    assert [run["seed"] for run in identity] == [0, 1, 2]
    slower = runs["tokens/soft-7.5e-3-start-0.5"]
    later = read([DATA / "914f5ff-models.jsonl.xz"], "")
    minutes = [*later["minutes/identity-16-9e-3"], *runs["minutes/identity-16-9e-3"][1:]]
    soft_minutes = [*runs["minutes/soft-8e-3"], *runs["minutes/soft"]]
    rare = [*runs["minutes/identity-1e-2"], *runs["minutes/identity"]]
    for found in (soft, slower, minutes, soft_minutes, rare):
        assert [run["seed"] for run in found] == [0, 1, 2]
    for key, digits in (("perplexity", 2), ("kl", 4)):
        for best in (identity, minutes):
            assert f"**{spread(best, key, digits)}**" in PAGE
        for other in (soft, slower, soft_minutes, rare):
            assert f"| {spread(other, key, digits)} |" in PAGE
    for others in (soft, slower, minutes, soft_minutes, rare):
        assert f"| {words(others, identity, 3)} |" in PAGE
    ahead = difference(soft_minutes, minutes, "kl")
    assert f"ahead by {ahead.mean:.3f} ({ahead.low:.3f} to {ahead.high:.3f}), three seeds" in PAGE
    tuned = read([DATA / "fba8764-models.jsonl.xz"], "")["tuned"]
    for others in (identity, minutes, soft_minutes):
        for key in ("kl", "nll"):
            found = difference(*same_seeds(others, tuned), key)
            assert f"{found.mean:+.3f}, {found.low:+.3f} to {found.high:+.3f}" in PAGE
    own = {"through": 3, "scalar": 3, "native-3e-3": 2, "native-1.5e-2": 2}
    for name, digits in own.items():
        assert f"| {words(runs[f'tokens/{name}'], first, digits)}, the same seed |" in PAGE
    then_soft = read([DATA / "3815181-models.jsonl.xz"], "")["tokens/then-soft-0.2"]
    gain = difference(then_soft, first, "kl")
    assert f"({gain.mean:.4f},\n{gain.low:.4f} to {gain.high:.4f})" in PAGE


def test_the_fifth_search() -> None:
    runs = read([DATA / "b560f7f-models.jsonl.xz"], "")
    tokens = ("identity-2.2e-2", "identity-3e-2", "soft-7.5e-3", "soft-4e-3")
    names = [f"tokens/{name}-start-0.5" for name in tokens]
    for name in (*names, "minutes/identity-16-9e-3", "minutes/soft-4e-3"):
        run = runs[name][0]
        ends = [record["seconds"] for record in run["log"]]
        last = run["log"][-1]
        cells = [
            *(f"{last['heldout_kl_hard']:.4f}", f"{run['perplexity']:.2f}", f"{run['kl']:.4f}"),
            *(f"{last['drift']:.3f}", f"{run['changed']:.3f}"),
            f"{statistics.median(b - a for a, b in pairwise(ends)):.2f} |",
        ]
        assert " | ".join(cells) in PAGE.replace("*", ""), name


def test_the_best_models() -> None:
    names = ("ldlq12-7min", "ldlq12-7min-32", "ldlq16-7min", "ldlq16-15min", "tuned16-7min")
    runs = read([DATA / "b560f7f-models.jsonl.xz"], "")
    later = read([DATA / "914f5ff-models.jsonl.xz"], "")
    found = [run for name in (*names, "defaults16") for run in runs[name]]
    found += [run for name in later if not name.startswith("minutes/") for run in later[name]]
    cells = [cell.strip(" *") for cell in PAGE.replace("\n", "").split("|")]
    for run in found:
        steps, seconds = len(run["log"]), round(run["seconds"])
        row = [f"{run['perplexity']:.2f}", f"{run['kl']:.4f}"]
        ends = [i for i in range(len(cells)) if cells[i : i + 2] == row]
        assert any(
            cells[i - 1] == str(seconds) and cells[i - 2].startswith(f"{steps}, ") for i in ends
        ), run["name"]


def test_windows_that_begin_elsewhere_and_text_of_another_kind() -> None:
    runs = read([DATA / "914f5ff-models.jsonl.xz"], "")
    shifted = runs["shift/ldlq12-7min"]
    assert [run["seed"] for run in shifted] == [0, 1, 2]
    assert spread(shifted, "perplexity", 2) in PAGE
    first, mixed = shifted[:1], runs["mixed/ldlq12-7min"]
    cost = difference(first, runs["control/ldlq12-7min"], "kl")
    assert f"({cost.mean:+.4f}, {cost.low:+.4f} to {cost.high:+.4f})" in PAGE
    for other in (first, shifted):
        gain = difference(other, mixed, "kl")
        assert f"{gain.mean:.4f} ({gain.low:.4f} to {gain.high:.4f})" in PAGE


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


def test_every_run_is_scored_on_whole_texts() -> None:
    for path in sorted(DATA.iterdir()):
        runs = [run for seeds in read([path], "").values() for run in seeds]
        assert runs, path
        for run in runs:
            (windows,) = {len(scores) for scores in run["windows"].values()}
            assert windows in (148, 16), run["name"]  # 16 in the third search


def claims(*commits: str) -> list[Run]:
    return read_records([DATA / f"{commit}-claims.jsonl.xz" for commit in commits])


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


def test_mixed_gradients_against_identity() -> None:
    named = "a5ef0bd-models", "349811a-models", "349811a-slow", "96fc7dc-slow"
    runs = read_records([DATA / f"{name}.jsonl.xz" for name in named])
    own = ("tokens/identity-1.5e-2-start-0.5", "tokens/identity")
    identity = [run for run in runs if run["name"] in own]
    for name, seeds in (("0.25-1.5e-2", 3), ("1.5e-2", 2), ("stride-4-1.5e-2", 1)):
        mixed = [r for r in runs if r["name"] == f"recipes/mixed-{name}"]
        assert len(mixed) == seeds
        gain = difference(*same_seeds(mixed, identity), "kl")
        assert gain.high < 0
        assert f"{gain.mean:.4f} ({gain.low:.4f} to {gain.high:.4f})" in PAGE
        if seeds == 3:
            assert spread(mixed, "perplexity", 2) in PAGE
            assert spread(mixed, "kl", 4) in PAGE
            seed = by_seed(mixed, identity, "kl")
            assert f"is {seed[0]:.4f}, {seed[1]:.4f} and {seed[2]:.4f}. A t interval" in PAGE
            over = over_seeds(seed)
            assert f"{over.mean:.4f} ± {over.high - over.mean:.4f}" in PAGE


def test_long_runs_of_mixed_gradients_against_identity() -> None:
    (mixed,) = read([DATA / "476d123-models.jsonl.xz"], "best/").values()
    (shorter,) = read([DATA / "96fc7dc-models.jsonl.xz"], "best/").values()
    (other,) = read([DATA / "96fc7dc-slow.jsonl.xz"], "best/").values()
    runs = read([DATA / "914f5ff-models.jsonl.xz"], "shift/")
    large, small = runs["shift/ldlq12-7min-32"], runs["shift/ldlq12-7min"]
    for found, rival, ahead in (
        (mixed, runs["shift/ldlq12-15min"], True),
        (mixed, large, True),
        (shorter, large, False),
        (other, small, True),
    ):
        gain = difference(*same_seeds(found, rival), "kl")
        assert gain.high < 0 if ahead else gain.low > 0
        low, high = sorted((abs(gain.low), abs(gain.high)))
        assert f"{abs(gain.mean):.4f} ({low:.4f} to {high:.4f})" in PAGE
        (run,) = found
        assert f"| {run['perplexity']:.2f} | {run['kl']:.4f} |" in PAGE
    level = difference(*same_seeds(shorter, small), "kl")
    assert level.low < 0 < level.high
    for (run,), seconds in ((mixed, "0.61 (medians)"), (shorter, "0.48 s (median)")):
        ends = [record["seconds"] for record in run["log"]]
        steps = statistics.median(b - a for a, b in pairwise(ends))
        assert f"{steps:.2f}" == seconds.split()[0]
        assert seconds in PAGE


def test_two_minutes_of_straight_through_and_of_the_scalar_codes() -> None:
    runs = read([DATA / "476d123-models.jsonl.xz"], "minutes/")
    (identity,) = read([DATA / "a5ef0bd-models.jsonl.xz"], "tokens/identity-1.5e-2-start").values()
    for name, digits in (("through-32", 3), ("scalar", 3), ("native", 2)):
        (run,) = found = runs[f"minutes/{name}"]
        cells = f"{len(run['log'])} | {run['perplexity']:.2f} | {run['kl']:.4f}"
        assert f"| {cells} | {words(found, identity, digits)}, the same seed |" in PAGE


def test_what_plain_viterbi_loses_compounds() -> None:
    runs = [run for run in claims(*VITERBI) if "kl" in run]
    losses = {(run["name"], run["seed"]): math.log(run["perplexity"] / 21.64) for run in runs}
    page = " ".join(PAGE.split())
    ptq, identity, soft = "", "/identity@0.01", "/soft-0.3@0.03"
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


def test_the_ninth_search() -> None:
    ((turns,),) = read([DATA / "476d123-slow.jsonl.xz"], "").values()
    assert f"perplexity {turns['perplexity']:.2f} and KL {turns['kl']:.4f}" in PAGE
    losses = [record["loss"] for record in turns["log"]]
    assert f"from {losses[1]:.2f} to {max(losses[:8]):.2f} within the first eight steps" in PAGE


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


def test_rows_of_several_files_and_intervals_over_seeds() -> None:
    runs = read([DATA / f"{name}-models.jsonl.xz" for name in ("0ffec44", "b560f7f")], "minutes/")
    chosen = rows(
        runs, ["soft=minutes/soft-8e-3+minutes/soft", "identity=minutes/identity-16-9e-3"]
    )
    check_seeds(chosen)
    pair = same_seeds(chosen["soft"], chosen["identity"])
    found = by_seed(*pair, "kl")
    assert {seed: round(value, 3) for seed, value in found.items()} == {
        0: 0.018,
        1: 0.062,
        2: 0.061,
    }
    over = over_seeds(found)
    assert over.mean == pytest.approx(difference(*pair, "kl").mean)
    assert over.low < 0 < over.high  # what the interval over windows does not say
    assert over_seeds({0: 1.0, 1: 2.0, 2: 3.0}).high == pytest.approx(2 + 4.303 / 3**0.5)
    with pytest.raises(ValueError, match="no run is called 'tuned'"):
        rows(runs, ["tuned"])
    twice = rows(runs, ["minutes/soft+minutes/soft"])
    with pytest.raises(ValueError, match="a seed twice"):
        check_seeds(twice)
    again = read([DATA / "b560f7f-models.jsonl.xz", DATA / "914f5ff-models.jsonl.xz"], "minutes/")
    (first,) = [run for run in latest(again)["minutes/identity-16-9e-3"] if run["seed"] == 0]
    assert first["commit"] == "914f5ff"


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
