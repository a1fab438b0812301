"""benchmarks/claims.py, from the command line to its tables, on a model of two small layers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any, Protocol

import claims
import claims_plots
import known
import pytest
import several
import torch
from experiment import Experiment
from layer_experiment import LayerExperiment
from layer_runs import changes, heldout, moved, trajectories, unions
from results_tables import read_records

from softtrellis.recipes.trainer import START

Record = dict[str, Any]


class Claim(Protocol):
    def __call__(self, claim: str, *options: str) -> list[Record]: ...


@pytest.fixture
def common(tiny_directory: Path, tmp_path: Path, one_thread: None) -> list[str]:
    """The model, and what all scripts need."""
    letters = torch.randint(97, 123, (6000,), generator=torch.Generator().manual_seed(0))
    text, results = tmp_path / "text.txt", tmp_path / "runs.jsonl"
    text.write_text("".join(map(chr, letters.tolist())), encoding="utf-8")
    words = [str(tiny_directory), "--calibration", str(text), "--train", str(text)]
    words += ["--test", str(text), "--device", "cpu", "--ctx", "32", "--test-ctx", "32"]
    words += ["--held-out", "2", "--test-windows", "4", "--calibration-windows", "4"]
    return [*words, "--quantize", "--code gaussian --L 6", "--json", str(results)]


@pytest.fixture
def run_claim(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Claim:
    def run(claim: str, *options: str) -> list[Record]:
        words = ["claims.py", claim, *common, "--batch", "2", *options]
        monkeypatch.setattr(sys, "argv", words)
        claims.main()
        return read_records([tmp_path / "runs.jsonl"])

    return run


def test_single_and_pairs(run_claim: Claim) -> None:
    some = "--steps", "2", "--starts", "viterbi", "--seeds", "0", "1"
    records = run_claim("single", "--layers", "0", "1", *some, "--settings", "identity@1e-2,1e-1")
    assert len(records) == 2 * (3 + 2)
    second: dict[int, str] = {}
    for layer in (0, 1):
        runs = {(r["seed"], r["name"]): r for r in records if f"/{layer}/viterbi/" in r["name"]}
        better = min((name for seed, name in runs if seed == 0), key=lambda n: heldout(runs[0, n]))
        (second[layer],) = (name for seed, name in runs if seed == 1)
        assert second[layer] == better
    lr = second[0].partition("@")[2]
    records = run_claim("pairs", "--layers", "0", "1", *some, "--settings", f"identity@{lr}")
    assert f"pairs/0,1/viterbi/identity@{lr}" in [record["name"] for record in records]
    assert [change.rates for change in changes(records)] == [2, 1, 2]  # 0, both, 1
    (union,) = unions(records)
    assert union.setting.layers == (0, 1)
    assert list(union.seeds) == ([0, 1] if second[1].endswith(f"@{lr}") else [0])
    codes = run_claim("single", "--trainable", "latents", "--layers", "1", "--steps", "2")
    assert codes[-1]["name"] == "single-latents/1/ldlq/soft-0.1@0.1"


def test_known_runs_are_not_made_again(
    run_claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = "--layers", "1", "--steps", "2", "--settings", "identity@1e-2,1e-1"
    first = {record["name"]: record for record in run_claim("single", *some)}
    folder, more = tmp_path / "folder", tmp_path / "folder" / "more.jsonl"
    monkeypatch.setattr(sys, "argv", ["known.py", str(folder), str(tmp_path / "runs.jsonl")])
    known.main()
    shared = "--claims", str(folder / "claims"), "--json", str(more)
    run_claim("single", *some, *shared, "--seeds", "0", "1")
    trained = {name: record for name, record in first.items() if record["train"]}
    best = min(trained, key=lambda name: heldout(trained[name]))
    found = [(record["seed"], record["name"]) for record in read_records([more])]
    assert found == [(1, "single/1/ldlq"), (1, best)]


def test_drift(run_claim: Claim, tmp_path: Path) -> None:
    some = "--layers", "1", "--grid-steps", "3", "--radii-tiles", "14"
    records = run_claim("drift", *some, "--settings", "identity@1e-7,1")
    still, far = moved(records)
    assert still.changed == 0  # counted against the start
    assert 0 < far.changed <= 1
    assert len(still.layers) == 7
    (radii,) = (record for record in records if "radii" in record)
    assert still.tiles == sum(radii["tiles"].values())
    claims_plots.draw(records, tmp_path / "drift.png")


def test_overshoot_scores_the_test_text_and_changes_nothing(run_claim: Claim) -> None:
    some = "--layers", "1", "--steps", "4", "--trajectory-every", "2", "--settings", "soft-1.0@1e-1"
    run_claim("overshoot", *some, "--trajectory-windows", "0")
    unseen, seen = run_claim("overshoot", *some, "--trajectory-windows", "4")
    assert unseen["windows"] == seen["windows"]
    assert "test" not in unseen["log"][-1]
    assert len(seen["log"][0]["test_start"]["nll"]) == 4
    (kept, _), log = seen["kept"][0], seen["log"]
    scores = log[0]["test_start"] if kept == START else log[kept]["test"]
    for metric in ("nll", "kl"):
        assert scores[metric] == pytest.approx(seen["windows"][metric], abs=1e-2)
    (runs,) = trajectories([seen]).values()
    assert runs == [seen]


def test_training_is_that_of_the_library(run_claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    some = "--layers", "1", "--steps", "3", "--settings", "soft-0.1@1e-1"
    (_, ours) = run_claim("single", *some)
    monkeypatch.setattr(LayerExperiment, "train", Experiment.train)
    library = run_claim("single", *some)[-1]
    assert ours["windows"] == library["windows"]
    assert ours["heldout"] == library["heldout"]


def test_several_in_one_process_and_the_best_of_rivals(
    common: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = "--steps 2 --batch 2 --measure-every 0 --start 0"
    first = [f"gentle={short} --lr 1e-6", f"wild={short} --lr 9"]
    then = [f"more@gentle={short} --lr 1e-6", f"others@wild={short} --lr 1"]
    words = ["experiment.py", *common]
    commands = [
        [*words, *first],
        ["nothing.py"],
        ["experiment.py", "--unknown"],
        [*words, *then, "--seeds", "0", "1"],
    ]
    queue = tmp_path / "commands"
    queue.write_text("".join(f"{shlex.join(command)}\n" for command in commands), "utf-8")
    monkeypatch.setattr(sys, "argv", ["several.py", str(queue)])
    with pytest.raises(SystemExit, match="2 of the scripts failed"):
        several.main()
    records = read_records([tmp_path / "runs.jsonl"])
    kept = {(r["name"], r["seed"]): r["kept"][0] for r in records}
    assert list(kept) == [("gentle", 0), ("wild", 0), ("more", 0), ("more", 1)]
    assert kept["gentle", 0][1] <= kept["wild", 0][1]
    assert "No module named 'nothing'" in capsys.readouterr().err
