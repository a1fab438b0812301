import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation.support import Page, results, training_log, write_run

from softtrellis.evaluation.compared_runs import read_runs, short_names
from softtrellis.evaluation.comparison_report import write_comparison
from softtrellis.evaluation.run_settings import differing
from softtrellis.io.files import STATE
from softtrellis.io.manifest import MANIFEST
from softtrellis.recipes.run_state import save_state

PNG = b"\x89PNG\r\n\x1a\n"
MakeRun = Callable[..., Path]


def manifest(**train: object) -> dict[str, Any]:
    """A manifest as small as one may be."""
    file = {"sha256": "0", "bytes": 1}
    return {
        "format": "softtrellis",
        "format_version": 2,
        "base": {"name": "tiny", "fingerprint": "0" * 64, "licence": "mit"},
        "codes": [{"spec": {"L": 4, "k": 2, "V": 1}, "name": "1mad"}],
        "layers": {"a": {"in_features": 32, "out_features": 64, "code": 0}},
        "files": {"model.safetensors": file, "config.json": file},
        "provenance": {"quantize": {"L": 4, "layers": ["28", "29"]}, "train": train},
    }


def long_log(steps: int = 60) -> list[dict[str, Any]]:
    """What training logs, with held-out scores every 20 steps."""
    log = training_log(steps)
    for record in log:
        record |= {"tokens": 100_000 * (record["step"] + 1), "skipped": record["step"] // 50}
        if record["step"] % 20 == 0:
            soft = 0.5 + (record["step"] - 40) ** 2 / 4000
            record |= {"heldout_kl": soft, "heldout_kl_hard": soft + 0.1}
    return log


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run: its log, results whose trained model has a mean difference to PTQ, settings."""

    def make(name: str, mean: float | None = -0.6, *, log: Any = None, **train: object) -> Path:
        content = None if mean is None else results(mean)
        run = write_run(tmp_path / name, long_log() if log is None else log, content)
        if train:
            (run / MANIFEST).write_text(json.dumps(manifest(**train)), encoding="utf-8")
        return run

    return make


def read(target: Path) -> tuple[str, Page]:
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return text, page


def test_three_runs(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [
        make_run("identity", -0.3, lr=0.01, estimator="identity", steps=60, layers=None),
        make_run("soft", -0.6, lr=0.03, estimator="soft", steps=60, layers=None),
        make_run("same", -0.3, lr=0.01, estimator="soft", steps=60, layers=None),
    ]
    target = tmp_path / "comparison.html"
    assert write_comparison(runs, target) == target
    text, page = read(target)
    assert "soft beats identity: on this text its KL divergence" in page.text
    assert "same is not shown to beat identity" in page.text
    assert "of twenty runs" in page.text
    differ = page.text.partition("Settings that differ")[2].partition("settings are the same")[0]
    assert "train.lr" in differ
    assert "train.estimator" in differ
    assert "train.steps" not in differ
    same = page.text.partition("settings are the same")[2]
    assert "28, 29" in same
    assert "not set" in same
    for title in (
        "Paired differences",
        "million tokens",
        "seconds",
        "Held-out KL, soft",
        "Held-out KL, hard",
        "Temperature",
        "Changed codes",
        "Drift of the latent weights",
        "Soft-to-hard gap",
    ):
        assert title in page.text
    assert page.text.count("0.5000 (41)") == 3
    assert page.text.count("0.6000 (41)") == 3
    assert page.text.count("full precision") == page.text.count("PTQ") == 1
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(place.startswith(("#", "data:")) for place in page.loads)
    assert not re.search(r"url\((?!#)", text)
    assert "#010203" not in text
    assert page.tags.count("figure") == 1 + 3 + 6 + 4
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', text)
    assert len(set(labels)) == page.tags.count("figure")
    assert (tmp_path / "comparison.png").read_bytes().startswith(PNG)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"comparison.html", "comparison.png", "identity", "soft", "same"}


def test_a_page_is_the_same_when_written_again(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a", lr=1), make_run("b", lr=2)]
    first, second = (
        write_comparison(runs, tmp_path / n).read_bytes() for n in ("1.html", "2.html")
    )
    assert first == second


def test_runs_without_results_without_a_log_and_without_settings(
    make_run: MakeRun, tmp_path: Path
) -> None:
    made = make_run("made", None, lr=0.1)
    scored = make_run("scored", -0.5, log=[])
    (scored / "log.jsonl").unlink()
    write_comparison([made, scored], tmp_path / "page.html")
    _, page = read(tmp_path / "page.html")
    assert "made has no results.json" in page.text
    assert "scored has no log.jsonl" in page.text
    assert "beats" not in page.text
    assert "Paired differences" not in page.text
    bare = [make_run(name, None, log=[{"step": 0, "loss": 1.0}]) for name in ("x", "y")]
    write_comparison(bare, tmp_path / "page.html")
    _, page = read(tmp_path / "page.html")
    assert page.text.count("has no settings in softtrellis.json") == 2
    assert page.tags.count("figure") == 1


def test_nothing_to_draw_removes_an_old_picture(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(name, None, log=[{"step": 0}]) for name in ("x", "y")]
    (tmp_path / "page.png").write_bytes(b"old")
    write_comparison(runs, tmp_path / "page.html")
    assert not (tmp_path / "page.png").exists()


def test_other_windows_are_not_compared(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a", -0.5, lr=1), make_run("b", -0.6, lr=2), make_run("c", -0.6, lr=3)]
    content = results(-0.6)
    content["windows"]["full precision"]["nll"][0] *= 1.01
    write_run(runs[1], content=content)
    write_comparison(runs, tmp_path / "page.html")
    _, page = read(tmp_path / "page.html")
    assert "b is not compared with a: the first models, which are the references" in page.text
    assert "c beats a" in page.text


def test_a_run_that_diverges_leaves_room_for_the_others(make_run: MakeRun, tmp_path: Path) -> None:
    broken = long_log()
    for record in broken[30:]:
        record["loss"] = 1e3 * record["step"] if record["step"] < 50 else math.nan
    runs = [make_run("good", None, lr=1), make_run("broken", None, log=broken, lr=2)]
    write_comparison(runs, tmp_path / "page.html")
    _, page = read(tmp_path / "page.html")
    assert "cut off: rises to 4.85e+04" in page.text
    for record in broken:
        record["loss"] = 1.0 + record["step"] / 100
    write_run(runs[1], broken)
    write_comparison(runs, tmp_path / "page.html")
    assert "cut off" not in read(tmp_path / "page.html")[1].text


def test_more_runs_than_colours(make_run: MakeRun, tmp_path: Path) -> None:
    log = [{"step": step, "loss": 1.0 / (step + 1)} for step in range(3)]
    runs = [make_run(f"run{i}", None, log=log) for i in range(14)]
    write_comparison(runs, tmp_path / "page.html")
    text, _ = read(tmp_path / "page.html")
    swatches = re.findall(r'<svg class="swatch".*?</svg>', text, re.DOTALL)
    assert len({re.sub(r'id="[^"]*"|#m\w+|#p\w+', "", each) for each in swatches}) == 14


def test_names_are_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("<i>a", lr="<script>"), make_run("b", lr=2)]
    write_comparison(runs, tmp_path / "page.html")
    _, page = read(tmp_path / "page.html")
    assert not {"i", "script"} & set(page.tags)
    assert "<i>a" in page.text
    assert "<script>" in page.text


def test_settings_of_a_run_that_is_not_finished(make_run: MakeRun) -> None:
    run = make_run("half", None)
    save_state(run, {}, step=10, settings={"lr": 0.3, "layers": ["29"], "text": "0123456789"})
    half, whole = read_runs([run, make_run("whole", lr=1, layers=["29"], data=["pydoc"])])
    assert half.settings == {"train.lr": "0.3", "train.layers": "29"}
    assert differing([half.settings, whole.settings]) == ["train.lr"]
    (run / STATE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged"):
        read_runs([run])


def test_settings_of_a_quickstart(make_run: MakeRun) -> None:
    (run,) = read_runs([make_run("quick")])
    assert run.settings == {"L": "12", "profile": "qtip", "layers": "12-17", "lr": "0.01"}


def test_the_model_of_a_run_is_the_one_with_its_name_else_the_last(make_run: MakeRun) -> None:
    last, named = make_run("last"), make_run("soft")
    content = json.loads((named / "results.json").read_text("utf-8"))
    content["rows"].insert(1, {"name": "runs/soft", "perplexity": 3.0})
    write_run(named, content=content)
    found = read_runs([last, named])
    assert [run.model for run in found] == ["BCJR-QAT", "runs/soft"]
    assert found[1].row is not None
    assert found[1].row.perplexity == 3.0
    assert len(found[1].other_rows) == 3


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        pytest.param(["runs/a", "runs/b"], ["a", "b"], id="last-part"),
        pytest.param(["x/seed0", "y/seed0"], ["x", "y"], id="same-end"),
        pytest.param(["x/s0", "y/s0", "x/s1"], ["x/s0", "y/s0", "x/s1"], id="two-parts"),
        pytest.param(["runs/a/"], ["a"], id="one"),
        pytest.param(["a", "a/qat"], ["a", "qat"], id="inside"),
    ],
)
def test_short_names(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(path) for path in paths]) == names


def test_a_run_that_is_named_twice(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a")
    with pytest.raises(ValueError, match="named twice"):
        write_comparison([run, tmp_path / "b" / ".." / "a"], tmp_path / "page.html")
