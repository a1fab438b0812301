"""Whole models in docs/results.md and docs/results-history.md against the runs they are made of."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
from results_page import DATA, PAGE, Run
from results_tables import (
    by_seed,
    check_seeds,
    difference,
    latest,
    over_seeds,
    read,
    read_records,
    rows,
    same_seeds,
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


def test_every_run_is_scored_on_whole_texts() -> None:
    for path in sorted(DATA.iterdir()):
        runs = [run for seeds in read([path], "").values() for run in seeds]
        assert runs, path
        for run in runs:
            (windows,) = {len(scores) for scores in run["windows"].values()}
            assert windows in (148, 16), run["name"]  # 16 in the third search


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


def test_the_ninth_search() -> None:
    ((turns,),) = read([DATA / "476d123-slow.jsonl.xz"], "").values()
    assert f"perplexity {turns['perplexity']:.2f} and KL {turns['kl']:.4f}" in PAGE
    losses = [record["loss"] for record in turns["log"]]
    assert f"from {losses[1]:.2f} to {max(losses[:8]):.2f} within the first eight steps" in PAGE


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
