"""Accuracy on tasks such as ARC and HellaSwag, through lm-evaluation-harness."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softtrellis.extras import install
from softtrellis.io.sources import muted, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOCAL = "local_"
"""What the names of tasks in a folder may start with, so that they are not taken for lm-eval's."""
ALIASES = {"lambada": "lambada_openai"}
"""Short names of lm-eval's own tasks."""
# The standard errors of perplexities are bootstrapped, slowly: lm-eval's own 100,000 samples take
# minutes. A thousand give the error to 2%.
_BOOTSTRAP_SAMPLES = 1000


class UnknownTaskError(ValueError):
    """A name that is no task."""


@dataclass(frozen=True)
class TaskConfig:
    """Which tasks, and how many items of each.

    Attributes:
        tasks: names. With ``task_dir``, those of its task files, where "local_" may be left out;
            else lm-eval's own, whose items come from the Hugging Face hub. "lambada" is then
            short for "lambada_openai".
        task_dir: a folder with data files and, in ``tasks/``, lm-eval's task files (YAML). Their
            relative ``data_files`` are looked for in the folder, then in the one that holds it.
        limit: items per task, from the start; None is all.
        batch_size: sequences per forward pass.
        seed: of the choice of examples, in tasks that show some before each item.
    """

    tasks: tuple[str, ...]
    task_dir: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int = 1234

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise ValueError(f"tasks must be names such as 'arc_easy', got {self.tasks!r}")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError("tasks must not be named twice; name each once")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class Metric:
    """A mean over a task's items, with its standard error where there is one."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """What a model reached in one task.

    Attributes:
        task: the name in lm-eval, "local_arc_easy" for instance.
        items: how many were evaluated.
        metrics: by lm-eval's names: "acc", "acc_norm", "perplexity", ...
    """

    task: str
    items: int
    metrics: Mapping[str, Metric]


def load_tasks(config: TaskConfig) -> dict[str, Any]:
    """Load the tasks with their items; they serve for any number of models.

    Returns:
        lm-eval's task objects by name, without "local_". A group or tag of lm-eval gives several.

    Raises:
        ImportError: lm-eval is not installed.
        FileNotFoundError: ``task_dir`` holds no task files, or a data file is missing.
        UnknownTaskError: a name that is no task, with those that there are.
        ConnectionError: lm-eval's own task where the hub cannot be reached.
        ValueError: a task file or its data that lm-eval cannot read.
    """
    _require_lm_eval()
    from lm_eval.tasks import TaskManager

    folder = config.task_dir
    if folder is not None and not list(folder.glob("tasks/**/*.yaml")):
        raise FileNotFoundError(
            f"{folder} has no tasks/*.yaml; give the folder that holds lm-eval's task files in "
            "tasks/, or leave --task-dir out for lm-eval's own tasks"
        )
    loaded: dict[str, Any] = {}
    with quiet(), muted("lm_eval", "datasets"):
        if folder is None:
            manager = TaskManager()
            known = manager.all_tasks  # groups and tags too
        else:
            manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
            known = manager.all_subtasks
        names = [_resolve(name, known, folder) for name in config.tasks]
        for name in names:
            wanted = name if folder is None else _local(name, manager.task_index[name].cfg, folder)
            loaded.update(_load(manager, wanted, name, folder))
    return {name.removeprefix(LOCAL): task for name, task in loaded.items()}


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    config: TaskConfig,
) -> dict[str, TaskResult]:
    """Evaluate a model on tasks, without a chat template.

    Dequantize a quantized model first (``dequantize_``): its layers would decode their weights on
    every forward pass. The model is left in eval mode.

    Args:
        model: a causal language model, where it is to run.
        tokenizer: the model's.
        tasks: from :func:`load_tasks`.
        config: what the tasks were loaded with.

    Returns:
        A result for each of ``tasks``, under its name there.
    """
    _require_lm_eval()
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    with muted("lm_eval", "datasets"), redirect_stdout(sys.stderr):
        language_model = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # HFLM sets its padding
            backend="causal",
            batch_size=config.batch_size,
        )
        for task in tasks.values():
            task.set_fewshot_seed(config.seed)
        output = evaluate(
            lm=language_model,
            task_dict={"tasks": {task.task_name: task for task in tasks.values()}},
            limit=config.limit,
            bootstrap_iters=_BOOTSTRAP_SAMPLES,
            log_samples=False,
        )
    return {name: task_result(output, task.task_name) for name, task in tasks.items()}


def task_result(output: Mapping[str, Any], task: str) -> TaskResult:
    """One task of what lm-eval's ``evaluate`` returns.

    Its metrics have keys such as "acc,none" and "acc_stderr,none", with the name of a filter of
    the answers after the comma; a filter other than "none" stays in the metric's name.
    """
    scores = output["results"][task]
    metrics = {}
    for key, value in scores.items():
        name, comma, answers = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = scores.get(f"{name}_stderr,{answers}")
        metrics[name if answers == "none" else key] = Metric(
            float(value), float(error) if isinstance(error, int | float) else None
        )
    return TaskResult(task, int(output["n-samples"][task]["effective"]), metrics)


def _require_lm_eval() -> None:
    if find_spec("lm_eval") is None:
        raise ImportError(f"tasks need lm-evaluation-harness; {install('eval')}")


def _resolve(name: str, known: Sequence[str], folder: Path | None) -> str:
    """lm-eval's name of a task."""
    if folder is None:
        full = ALIASES.get(name, name)
        if full in known:
            return full
        near = get_close_matches(name, known, n=5)
        raise UnknownTaskError(
            f"lm-eval has no task {name!r}; "
            + (f"near it are {', '.join(near)}; " if near else "")
            + "'lm-eval ls tasks' lists all"
        )
    for full in (name, LOCAL + name):
        if full in known:
            return full
    names = ", ".join(each.removeprefix(LOCAL) for each in known)
    raise UnknownTaskError(f"{folder} has no task {name!r}; it has {names}")


def _local(name: str, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A task of a folder, with whole paths. Only a group can override settings of a task file."""
    overridden: dict[str, Any] = {"task": name}
    options = settings.get("dataset_kwargs") or {}
    if "data_files" in options:
        files = _find(options["data_files"], folder)
        overridden["dataset_kwargs"] = {**options, "data_files": files}
    return {"group": "local", "task": [overridden]}


def _find(files: Any, folder: Path) -> Any:
    """``data_files`` (a path, a list, or either by split) with whole paths."""
    if isinstance(files, Mapping):
        return {split: _find(part, folder) for split, part in files.items()}
    if isinstance(files, list):
        return [_find(part, folder) for part in files]
    whole = folder.resolve()
    for above in (whole, whole.parent):
        if (above / files).is_file():
            return str(above / files)
    raise FileNotFoundError(
        f"{files}, which a task in {folder / 'tasks'} reads, is neither in {folder} nor beside it"
    )


def _load(
    manager: Any, wanted: str | dict[str, Any], name: str, folder: Path | None
) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError

    try:
        loaded: dict[str, Any] = manager.load([wanted])["tasks"]
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if folder is None:
            raise ConnectionError(
                f"the items of task {name!r} cannot be loaded from the Hugging Face hub: check the "
                "network, or give a folder with tasks and their items (--task-dir)"
            ) from error
        raise ValueError(f"task {name!r} in {folder} cannot be loaded: {error}") from error
    return loaded
