"""eval --tasks, on a tiny model and two tiny tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli.support import Command, Refused

from softtrellis.evaluation import harness
from softtrellis.evaluation.harness import Metric, TaskConfig, TaskResult
from softtrellis.modules.replace import quantized_layers

ITEMS = [
    ("ab", ["a", "b"], 0),
    ("cd", ["c", "d"], 1),
    ("ef", ["e", "f"], 0),
    ("g", ["g", "h"], 1),
]
CHOICE = """
task: local_letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{query}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LAST_WORD = """
task: local_lambada
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{query}}"
doc_to_target: " {{choices[0]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
TEXT = ["--ctx", "32", "--windows", "2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks with the same four items."""
    (tmp_path / "set" / "tasks").mkdir(parents=True)
    (tmp_path / "set" / "tasks" / "letters.yaml").write_text(CHOICE, encoding="utf-8")
    (tmp_path / "set" / "tasks" / "lambada.yaml").write_text(LAST_WORD, encoding="utf-8")
    lines = [json.dumps({"query": q, "choices": c, "gold": g}) for q, c, g in ITEMS]
    (tmp_path / "set" / "letters.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "set"


def test_without_lm_eval(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    message = refused("eval", "no-such-model", "--tasks", "piqa", code=1)
    assert message == (
        "tasks need lm-evaluation-harness; install softtrellis with the extra 'eval', from its "
        "clone: .venv/bin/pip install -e '.[eval]'"
    )


def test_quantized_models_are_dequantized_first(
    softtrellis: Command,
    model: Path,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = {"letters": SimpleNamespace(task_name="local_letters")}
    configs: list[TaskConfig] = []

    def load(config: TaskConfig) -> Mapping[str, Any]:
        configs.append(config)
        return tasks

    def run(model: Any, tokenizer: Any, given: Any, config: TaskConfig) -> dict[str, TaskResult]:
        assert given is tasks
        assert not quantized_layers(model)
        return {"letters": TaskResult("local_letters", 1500, {"acc": Metric(0.5, 0.0125)})}

    monkeypatch.setattr(harness, "load_tasks", load)
    monkeypatch.setattr("softtrellis.recipes.pipeline.run_tasks", run)
    options = ["--tasks", "letters, x", "--task-dir", "set", "--limit", "7"]
    result = softtrellis("eval", model, checkpoint, *options)
    assert result.code == 0, result.err
    assert configs == [TaskConfig(("letters", "x"), task_dir=Path("set"), limit=7)]
    assert result.out.count("0.5000 ± 0.0125") == 2
    assert "perplexity" not in result.out

    options += ["--data", text, *TEXT, "--json", tmp_path / "both.json"]
    result = softtrellis("eval", model, checkpoint, *options)
    assert result.code == 0, result.err
    assert "perplexity" in result.out
    assert "95% interval" in result.out
    assert result.out.count("0.5000 ± 0.0125") == 2
    both = json.loads((tmp_path / "both.json").read_text(encoding="utf-8"))
    assert both["rows"][1]["perplexity"] > 1
    metrics = both["tasks"][str(checkpoint)]["letters"]["metrics"]
    assert metrics == {"acc": {"value": 0.5, "stderr": 0.0125}}
    assert both["settings"] | {"limit": 7, "windows": 2, "ctx": 32} == both["settings"]


def test_tasks_through_lm_eval(
    softtrellis: Command, model: Path, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    options = ["--tasks", "letters,lambada", "--task-dir", folder, "--limit", "3"]
    options += ["--json", tmp_path / "results.json"]
    result = softtrellis("eval", model, checkpoint, *options)
    assert result.code == 0, result.err
    lines = [line.split() for line in result.out.splitlines()]
    assert [line[:3] for line in lines[-4:]] == [
        ["letters", "acc", "3"],
        ["letters", "acc_norm", "3"],
        ["lambada", "perplexity", "3"],
        ["lambada", "acc", "3"],
    ]
    assert all(line.count("±") == 2 for line in lines[-4:])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results["tasks"]) == [str(model), str(checkpoint)]
    for found in results["tasks"].values():
        assert found["letters"]["task"] == "local_letters"
        assert found["letters"]["metrics"]["acc"]["value"] in (0, 1 / 3, 2 / 3, 1)
        assert found["lambada"]["metrics"]["perplexity"]["value"] > 1
    assert softtrellis("report", tmp_path).code == 0


def test_unknown_tasks(refused: Refused, folder: Path) -> None:
    pytest.importorskip("lm_eval")
    options = ["--tasks", "letters,words", "--task-dir", folder]
    message = refused("eval", "no-such-model", *options, code=2)
    assert message == f"{folder} has no task 'words'; it has lambada, letters"


def test_items_that_cannot_be_read(refused: Refused, folder: Path) -> None:
    pytest.importorskip("lm_eval")
    (folder / "letters.jsonl").write_text("no JSON", encoding="utf-8")
    message = refused("eval", "m", "--tasks", "letters", "--task-dir", folder, code=1)
    assert message.startswith(f"task 'local_letters' in {folder} cannot be loaded: ")
