"""softtrellis quickstart"""

from __future__ import annotations

import argparse
from pathlib import Path

from softtrellis.cli.common import (
    Commands,
    add_data,
    add_layers,
    add_output,
    check_inputs,
    command,
    layers_of,
    usage_errors,
)


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "quickstart",
        "quantize, train, evaluate and report on a default that always works",
        "softtrellis quickstart --layers 28,29 --steps 60",
        "Defaults fit two CPU cores and 12 minutes.",
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the teacher")
    add_output(parser, "everything", default="runs/quickstart")
    add_layers(parser, default="29")
    add_data(parser, "text")
    parser.add_argument("--bits", type=int, default=2, help="bits per weight")
    parser.add_argument("--L", type=int, default=10, help="bits of a trellis state")
    parser.add_argument("--steps", type=int, default=24, help="training steps")
    parser.add_argument("--lr", type=float, default=1.5e-2, help="peak learning rate")
    parser.add_argument(
        "--windows", type=int, default=24, help="held-out windows of 512 tokens to evaluate on"
    )
    parser.add_argument("--short", action="store_true", help="smallest sizes, to test the set-up")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the whole way."""
    from softtrellis.recipes.quickstart import QuickstartConfig, quickstart

    with usage_errors(options):
        config = QuickstartConfig(
            model=options.model,
            layers=layers_of(options.layers),
            data=tuple(options.data),
            bits=options.bits,
            L=options.L,
            steps=options.steps,
            lr=options.lr,
            eval_windows=options.windows,
        )
        if options.short:
            config = config.shortened()
    output = Path(options.output)
    check_inputs(output, options.model, data=options.data)
    quickstart(config, output, force=options.force)
    return 0
