"""softtrellis eval"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softtrellis.cli.common import (
    Commands,
    UsageError,
    add_data,
    add_device,
    check_backend,
    check_json,
    command,
    usage_errors,
)

if TYPE_CHECKING:
    from softtrellis.evaluation.harness import TaskConfig

TEXT, CTX = ("pydoc",), 2048


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "eval",
        "measure perplexity, KL divergence to the first model, and paired differences",
        "softtrellis eval smollm2-135m-instruct smollm2-2bit smollm2-2bit-qat --windows 16",
        "With --tasks it measures accuracy on tasks instead, and both if --data, --ctx or "
        "--windows is given too.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="checkpoints or full-precision models"
    )
    add_data(parser, "text to score, by default pydoc")
    parser.set_defaults(data=None)  # with --tasks, text is evaluated only if it is asked for
    parser.add_argument("--ctx", type=int, help=f"tokens per window (default: {CTX})")
    parser.add_argument("--windows", type=int, help="use at most so many windows")
    parser.add_argument(
        "--tasks",
        metavar="A,B,...",
        help="tasks of lm-evaluation-harness, for instance arc_easy,arc_challenge,hellaswag,piqa,"
        "winogrande,lambada; needs the extra 'eval'",
    )
    parser.add_argument(
        "--task-dir",
        metavar="DIR",
        help="read the tasks from tasks/*.yaml in this folder and their items from its data files, "
        "not from the Hugging Face hub",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of each task")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    add_device(parser, "what runs the models")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluates and prints tables."""
    from softtrellis.evaluation.harness import load_tasks
    from softtrellis.io.files import write_json
    from softtrellis.recipes.pipeline import add_tasks, evaluate_models, evaluate_tasks, summary

    config = _check(options)
    tasks = {} if config is None else load_tasks(config)
    results: dict[str, Any] = {}
    if config is None or _names_text(options):
        results = evaluate_models(
            options.models,
            tuple(options.data or TEXT),
            ctx=CTX if options.ctx is None else options.ctx,
            windows=options.windows,
            device=options.device,
        )
    if config is not None:
        measured = evaluate_tasks(options.models, tasks, config, device=options.device)
        results = add_tasks(results, measured) if results else measured
    print(summary(results))
    if options.json:
        write_json(Path(options.json), results)
    return 0


def _names_text(options: argparse.Namespace) -> bool:
    return any(value is not None for value in (options.data, options.ctx, options.windows))


def _check(options: argparse.Namespace) -> TaskConfig | None:
    """UsageError for options that make no sense; the configuration of the tasks, if any."""
    from softtrellis.evaluation.harness import TaskConfig

    if len(set(options.models)) != len(options.models):
        raise UsageError("a model is named twice; name each once")
    if options.ctx is not None and options.ctx < 2:
        raise UsageError(f"--ctx must be at least 2, got {options.ctx}")
    if options.windows is not None and options.windows < 1:
        raise UsageError(f"--windows must be at least 1, got {options.windows}")
    check_json(options.json)
    check_backend("auto", options.device)
    if options.tasks is None:
        for option in ("task_dir", "limit"):
            if getattr(options, option) is not None:
                raise UsageError(f"--{option.replace('_', '-')} needs --tasks; name some")
        return None
    names = tuple(part.strip() for part in options.tasks.split(",") if part.strip())
    if not names:
        raise UsageError("--tasks is empty; name some, for instance arc_easy,piqa")
    folder = None if options.task_dir is None else Path(options.task_dir)
    with usage_errors(options):
        return TaskConfig(names, task_dir=folder, limit=options.limit)
