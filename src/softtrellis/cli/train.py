"""softtrellis train"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from softtrellis.cli.common import (
    Commands,
    add_backend,
    add_data,
    add_layers,
    add_output,
    check_backend,
    check_inputs,
    command,
    layers_of,
    temperature,
    usage_errors,
)


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "train",
        "train a quantized model towards its teacher, through the trellis (BCJR-QAT)",
        "softtrellis train smollm2-2bit --teacher smollm2-135m-instruct -o smollm2-2bit-qat",
        "Temperatures are in units of the weights' variance, the learning rate in units of their "
        "standard deviation.",
    )
    parser.add_argument("checkpoint", help="directory that 'softtrellis quantize' made")
    parser.add_argument("--teacher", required=True, help="the model that it was made from")
    add_output(parser, "the trained checkpoint with its log")
    add_layers(parser)
    add_data(parser, "training text")
    parser.add_argument(
        "--mode",
        choices=["single", "greedy", "joint"],
        default="joint",
        help="joint: all layers at once; greedy: one decoder layer after the other; single: one",
    )
    parser.add_argument(
        "--estimator",
        choices=["soft", "straight_through", "identity"],
        default="soft",
        help="the Boltzmann average; or the hard code with its gradient, or with the identity's",
    )
    parser.add_argument(
        "--t-init", type=temperature, default=0.1, help="first temperature, or 'auto'"
    )
    parser.add_argument("--t-min", type=float, default=0.03, help="last temperature")
    parser.add_argument(
        "--schedule",
        choices=["exponential", "cosine"],
        default="exponential",
        help="how the temperature falls from the first to the last",
    )
    parser.add_argument("--lr", type=float, default=1e-2, help="peak learning rate of AdamW")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (per stage)")
    parser.add_argument("--warmup", type=int, default=5, help="steps of linear warm-up")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--ctx", type=int, default=512, help="tokens per window")
    parser.add_argument("--windows", type=int, help="use at most so many windows of the text")
    every = (
        ("--reencode-every", 25, "moves of the paths' ends"),
        ("--measure-every", 5, "measurements of drift and changed codes"),
        ("--save-every", 10, "saved states, which --resume goes on from"),
    )
    for option, default, what in every:
        parser.add_argument(
            option, metavar="N", type=int, default=default, help=f"steps between {what}; 0 is never"
        )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    add_backend(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Trains and saves."""
    from softtrellis.io.checkpoint import describe_sizes
    from softtrellis.recipes.pipeline import train_to
    from softtrellis.recipes.qat import DistillConfig

    with usage_errors(options):
        config = DistillConfig(
            layers=layers_of(options.layers),
            mode=options.mode,
            estimator=options.estimator,
            t_init=options.t_init,
            t_min=options.t_min,
            schedule=options.schedule,
            lr=options.lr,
            steps=options.steps,
            warmup=options.warmup,
            batch=options.batch,
            ctx=options.ctx,
            data=tuple(options.data),
            windows=options.windows,
            reencode_every=options.reencode_every,
            measure_every=options.measure_every,
            save_every=options.save_every,
            seed=options.seed,
            backend=options.backend,
            show_progress=True,
        )
    check_backend(options.backend)
    output = Path(options.output)
    check_inputs(output, options.checkpoint, options.teacher)
    result = train_to(
        Path(options.checkpoint),
        options.teacher,
        config,
        output,
        force=options.force,
        resume=options.resume,
    )
    first, last = result.history[0], result.history[-1]
    changed = sum(result.changed_codes.values()) / len(result.changed_codes)
    print(
        f"{len(result.history)} steps in {last['seconds']:.0f} s: loss {first['loss']:.4f} to "
        f"{last['loss']:.4f}, {changed:.2%} of codes changed"
    )
    print(describe_sizes(output))
    following = ["eval", options.teacher, options.checkpoint, str(output), "--data", "pydoc"]
    print(f"Next: softtrellis {shlex.join(following)}")
    return 0
