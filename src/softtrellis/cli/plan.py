"""softtrellis plan"""

from __future__ import annotations

import argparse
from pathlib import Path

from softtrellis.cli.common import (
    Commands,
    add_backend,
    add_device,
    add_layers,
    check_backend,
    check_json,
    command,
    layers_of,
    number,
    usage_errors,
)


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "plan",
        "say before a training run whether it can change codes at all",
        "softtrellis plan smollm2-2bit --teacher smollm2-135m-instruct --lr 0.01 --steps 100",
        "Compares how far AdamW can carry the latent weights with how far codewords are from where "
        "their codes change, measured on some tiles. Learning rates and radii are in units of the "
        "weights' standard deviation (sigma), radii as root mean squares over a tile's weights. "
        "It predicts for latents that start at the codewords, as with train --start 0, and takes "
        "no gradient of the loss: how Adam moves while gradients agree is measured along the signs "
        "of what a random gradient becomes behind the soft code.",
    )
    parser.add_argument("checkpoint", help="directory that 'softtrellis quantize' made")
    parser.add_argument(
        "--lr", type=number, default="auto", help="peak learning rate of AdamW; auto as in train"
    )
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps (per stage)")
    parser.add_argument("--warmup", type=int, default=5, help="steps of linear warm-up")
    parser.add_argument(
        "--schedule",
        choices=["cosine", "constant"],
        default="cosine",
        help="of the learning rate after its warm-up; cosine is that of 'softtrellis train'",
    )
    add_layers(parser)
    parser.add_argument(
        "--tiles", type=int, default=64, help="tiles measured, spread evenly over the layers"
    )
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="the model that the checkpoint was made from, to measure towards its weights too",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.1, help="of the soft code, see train"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the tiles and random directions")
    add_device(parser, "what measures")
    add_backend(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the radii of all tiles there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, and prints a table with a verdict."""
    from softtrellis.io.files import write_json
    from softtrellis.recipes.drift import rate_of_walk
    from softtrellis.recipes.plan import PlanConfig, plan_checkpoint
    from softtrellis.recipes.plan_text import describe, plan_record

    with usage_errors(options):
        lr = options.lr
        if lr == "auto":
            lr = rate_of_walk(options.steps, warmup=options.warmup, schedule=options.schedule)
        config = PlanConfig(
            lr=lr,
            steps=options.steps,
            warmup=options.warmup,
            schedule=options.schedule,
            layers=layers_of(options.layers),
            tiles=options.tiles,
            temperature=options.temperature,
            seed=options.seed,
            device=options.device,
            backend=options.backend,
        )
    check_backend(options.backend, options.device)
    check_json(options.json)
    plan = plan_checkpoint(Path(options.checkpoint), config, teacher=options.teacher)
    print(describe(plan))
    if options.json:
        write_json(Path(options.json), plan_record(plan))
    return 0
