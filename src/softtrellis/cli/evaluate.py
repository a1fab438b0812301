"""softtrellis eval"""

from __future__ import annotations

import argparse
from pathlib import Path

from softtrellis.cli.common import Commands, UsageError, add_data, check_json, command


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "eval",
        "measure perplexity, KL divergence to the first model, and paired differences",
        "softtrellis eval smollm2-135m-instruct smollm2-2bit smollm2-2bit-qat --windows 16",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="checkpoints or full-precision models"
    )
    add_data(parser, "held-out text")
    parser.add_argument("--ctx", type=int, default=2048, help="tokens per window")
    parser.add_argument("--windows", type=int, help="use at most so many windows")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluates and prints a table."""
    from softtrellis.io.files import write_json
    from softtrellis.recipes.pipeline import evaluate_models, summary

    if len(set(options.models)) != len(options.models):
        raise UsageError("a model is named twice; name each once")
    if options.ctx < 2:
        raise UsageError(f"--ctx must be at least 2, got {options.ctx}")
    if options.windows is not None and options.windows < 1:
        raise UsageError(f"--windows must be at least 1, got {options.windows}")
    check_json(options.json)
    results = evaluate_models(
        options.models, tuple(options.data), ctx=options.ctx, windows=options.windows
    )
    print(summary(results))
    if options.json:
        write_json(Path(options.json), results)
    return 0
