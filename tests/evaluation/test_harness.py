"""Tasks of lm-evaluation-harness: with stand-ins for it, and with itself where it is installed."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from softtrellis.evaluation import harness
from softtrellis.evaluation.harness import (
    Metric,
    TaskConfig,
    TaskResult,
    UnknownTaskError,
    load_tasks,
    run_tasks,
    task_result,
)
from softtrellis.evaluation.report import format_tasks

OUTPUT = {
    "results": {
        "local_arc": {
            "name": "local_arc",
            "alias": "local_arc",
            "sample_len": 20,
            "acc,none": 0.25,
            "acc_stderr,none": 0.1,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": 0.125,
        },
        "lambada_openai": {
            "alias": "lambada_openai",
            "perplexity,none": 31.5,
            "perplexity_stderr,none": 2.5,
            "acc,none": 1,
            "acc_stderr,none": "N/A",
        },
        "gsm": {"exact_match,strict": 0.0, "exact_match,loose": 0.5},
    },
    "n-samples": {
        "local_arc": {"original": 2376, "effective": 20},
        "lambada_openai": {"original": 5153, "effective": 1},
        "gsm": {"original": 8, "effective": 8},
    },
}


# Configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "tasks must be names"),
        ({"tasks": ("piqa", "")}, "tasks must be names"),
        ({"tasks": ("piqa", "piqa")}, "tasks must not be named twice"),
        ({"tasks": ("piqa",), "limit": 0}, "limit must be at least 1, got 0"),
        ({"tasks": ("piqa",), "batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_configurations_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(**options)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    config = TaskConfig(("piqa",))
    with pytest.raises(ImportError, match=r"\.venv/bin/pip install -e '\.\[eval\]'"):
        load_tasks(config)
    with pytest.raises(ImportError, match=r"\.venv/bin/pip install -e '\.\[eval\]'"):
        run_tasks(None, None, {}, config)


# Results


def test_results_of_a_task() -> None:
    arc = task_result(OUTPUT, "local_arc")
    assert arc == TaskResult(
        "local_arc", 20, {"acc": Metric(0.25, 0.1), "acc_norm": Metric(0.5, 0.125)}
    )
    lambada = task_result(OUTPUT, "lambada_openai")
    assert lambada.items == 1
    assert lambada.metrics == {"perplexity": Metric(31.5, 2.5), "acc": Metric(1.0, None)}
    assert list(task_result(OUTPUT, "gsm").metrics) == ["exact_match,strict", "exact_match,loose"]


def test_the_table() -> None:
    arc = {"items": 2376, "metrics": {"acc": {"value": 0.25, "stderr": 0.1}}}
    lambada = {"items": 9, "metrics": {"perplexity": {"value": 31.5, "stderr": None}}}
    results = {"arc": arc, "lambada": lambada}
    table = format_tasks({"a": results, "b": results})
    assert table.splitlines() == [
        "task         metric  items                a                b",
        "-------  ----------  -----  ---------------  ---------------",
        "arc             acc  2,376  0.2500 ± 0.1000  0.2500 ± 0.1000",
        "lambada  perplexity      9          31.5000          31.5000",
    ]


# With stand-ins for lm-eval


class Manager:
    """Knows four tasks, one of them with files."""

    made: dict[str, Any]
    loaded: list[Any]

    def __init__(self, **options: Any) -> None:
        Manager.made = options
        Manager.loaded = []
        files = {"test": "items/a.jsonl", "train": ["items/b.jsonl"]}
        settings = {"dataset_path": "json", "dataset_kwargs": {"field": "x", "data_files": files}}
        names = ["lambada_openai", "lambada_standard", "local_lambada", "local_piqa"]
        self.task_index = {name: SimpleNamespace(cfg=settings) for name in names}
        self.all_tasks = [*names, "lambada"]
        self.all_subtasks = names

    def load(self, wanted: list[Any]) -> dict[str, Any]:
        Manager.loaded += wanted
        names = [w if isinstance(w, str) else w["task"][0]["task"] for w in wanted]
        return {"tasks": {name: SimpleNamespace(task_name=name) for name in names}}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval and datasets with nothing in them but `Manager`."""
    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.tasks": {"TaskManager": Manager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {},
        "datasets": {},
        "datasets.exceptions": {"DatasetsError": type("DatasetsError", (Exception,), {})},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tasks; one data file is in it, the other beside it."""
    for name in ("set/tasks/piqa.yaml", "set/items/a.jsonl", "items/a.jsonl", "items/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "set"


@pytest.mark.usefixtures("stub")
def test_names_of_lm_eval() -> None:
    tasks = load_tasks(TaskConfig(("lambada", "lambada_standard")))
    assert list(tasks) == Manager.loaded == ["lambada_openai", "lambada_standard"]
    assert Manager.made == {}
    with pytest.raises(UnknownTaskError, match="no task 'lambda_openai'; near it are lambada_open"):
        load_tasks(TaskConfig(("lambda_openai",)))
    with pytest.raises(UnknownTaskError, match="no task 'zzz'; 'lm-eval ls tasks' lists all"):
        load_tasks(TaskConfig(("zzz",)))


@pytest.mark.usefixtures("stub")
def test_tasks_of_a_folder(folder: Path) -> None:
    tasks = load_tasks(TaskConfig(("lambada", "local_piqa"), task_dir=folder))
    assert {name: task.task_name for name, task in tasks.items()} == {
        "lambada": "local_lambada",
        "piqa": "local_piqa",
    }
    assert Manager.made == {"include_path": str(folder / "tasks"), "include_defaults": False}
    files = {
        "test": str(folder / "items/a.jsonl"),
        "train": [str(folder.parent / "items/b.jsonl")],
    }
    overridden = {"task": "local_lambada", "dataset_kwargs": {"field": "x", "data_files": files}}
    assert Manager.loaded[0]["task"] == [overridden]
    with pytest.raises(UnknownTaskError, match=r"no task 'arc'; it has lambada_openai, .* piqa"):
        load_tasks(TaskConfig(("arc",), task_dir=folder))


@pytest.mark.usefixtures("stub")
def test_folders_with_something_missing(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tasks/\*\.yaml; give the folder"):
        load_tasks(TaskConfig(("piqa",), task_dir=folder / "tasks"))
    (folder.parent / "items/b.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"^items/b\.jsonl, which .* nor beside it$"):
        load_tasks(TaskConfig(("piqa",), task_dir=folder))


@pytest.mark.usefixtures("stub")
def test_tasks_that_cannot_be_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise sys.modules["datasets.exceptions"].DatasetsError("no line is JSON")

    monkeypatch.setattr(Manager, "load", fail)
    with pytest.raises(ConnectionError, match=r"'lambada_openai' .* hub: .*--task-dir"):
        load_tasks(TaskConfig(("lambada",)))
    with pytest.raises(ValueError, match=r"'local_piqa' in .*set cannot be .*: no line"):
        load_tasks(TaskConfig(("piqa",), task_dir=folder))


@pytest.mark.usefixtures("stub")
def test_what_lm_eval_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}
    seeds: list[int] = []

    def evaluate(**options: Any) -> dict[str, Any]:
        asked.update(options)
        print("bootstrapping")
        return OUTPUT

    monkeypatch.setattr(sys.modules["lm_eval"], "evaluate", evaluate, raising=False)
    monkeypatch.setattr(
        sys.modules["lm_eval.models.huggingface"], "HFLM", SimpleNamespace, raising=False
    )
    task = SimpleNamespace(task_name="local_arc", set_fewshot_seed=seeds.append)
    config = TaskConfig(("arc",), limit=20, batch_size=3, seed=5)
    model, tokenizer = object(), ["padding"]
    results = run_tasks(model, tokenizer, {"arc": task}, config)
    assert results == {"arc": task_result(OUTPUT, "local_arc")}
    assert asked["lm"].pretrained is model
    assert asked["lm"].tokenizer == tokenizer
    assert asked["lm"].tokenizer is not tokenizer
    assert asked["lm"].batch_size == 3
    assert asked["task_dict"] == {"tasks": {"local_arc": task}}
    assert asked["limit"] == 20
    assert seeds == [5]
    assert capsys.readouterr().out == ""


# With lm-eval itself


def test_stories260k_as_lm_eval_alone_scores_it(
    stories260k: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from softtrellis.io.sources import load_source

    source = load_source(str(stories260k))
    folder = shared_data / "zero_shot"
    config = TaskConfig(("arc_easy", "lambada"), task_dir=folder, limit=20)
    tasks = load_tasks(config)
    results = run_tasks(source.model, source.tokenizer, tasks, config)
    assert {name: (r.task, r.items, list(r.metrics)) for name, r in results.items()} == {
        "arc_easy": ("local_arc_easy", 20, ["acc", "acc_norm"]),
        "lambada": ("local_lambada", 20, ["perplexity", "acc"]),
    }
    assert run_tasks(source.model, source.tokenizer, tasks, config) == results

    monkeypatch.chdir(shared_data)  # where the task files' relative paths lead somewhere
    expected = lm_eval.simple_evaluate(
        model=HFLM(pretrained=source.model, tokenizer=source.tokenizer, batch_size=8),
        tasks=["local_arc_easy", "local_lambada"],
        task_manager=TaskManager(include_path="zero_shot/tasks", include_defaults=False),
        limit=20,
        bootstrap_iters=1000,
    )
    for name, result in results.items():
        assert result == task_result(expected, f"local_{name}")
