"""softtrellis train"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softtrellis.cli.common import (
    Commands,
    add_backend,
    add_data,
    add_device,
    add_layers,
    add_output,
    check_backend,
    check_inputs,
    command,
    joined,
    layers_of,
    number,
    usage_errors,
)

if TYPE_CHECKING:
    from softtrellis.recipes.qat import DistillConfig


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "train",
        "train a quantized model towards its teacher, through the trellis",
        "softtrellis train smollm2-2bit --teacher smollm2-135m-instruct -o smollm2-2bit-qat",
        "Temperatures are in units of the weights' variance, the learning rate in units of their "
        "standard deviation.",
    )
    parser.add_argument("checkpoint", help="directory that 'softtrellis quantize' made")
    parser.add_argument("--teacher", required=True, help="the model that it was made from")
    add_output(parser, "the trained checkpoint with its log")
    add_layers(parser)
    add_data(parser, "training text", teacher="alone or beside others")
    parser.add_argument(
        "--mode",
        choices=["single", "greedy", "joint"],
        default="joint",
        help="joint: all layers at once, or those of --layers; greedy: one decoder layer after the "
        "other; single: like joint, but refused without --layers: the layers named there, with the "
        "rest of the model frozen",
    )
    estimators = ["soft", "straight_through", "mixed", "identity"]
    parser.add_argument(
        "--estimator",
        choices=estimators,
        default="identity",
        help="the Boltzmann average; or the hard code with its gradient, with the identity's, or "
        "with a mixture of both",
    )
    parser.add_argument(
        "--mix",
        type=float,
        default=0.25,
        help="the share of the Boltzmann average's gradient in that of mixed",
    )
    parser.add_argument(
        "--bcjr-stride",
        type=int,
        default=1,
        help="one tile in so many has this estimator in a step, in turn, the others identity",
    )
    parser.add_argument("--finish", choices=estimators, help="another one for the end of the run")
    parser.add_argument(
        "--finish-share", type=float, default=0.2, help="the share of the run that --finish takes"
    )
    parser.add_argument(
        "--start",
        type=number,
        default="auto",
        help="where latent weights start, if they are trained: 0 at the codewords, 1 at the "
        "original weights; auto is 0.5, but 0.25 from a checkpoint that was tuned as it was "
        "quantized, or trained",
    )
    parser.add_argument(
        "--train",
        metavar="A,B,...",
        default="latents,scales,norms",
        help="what is trained: latents, scales (of channels), norms, table (of the code hyb)",
    )
    parser.add_argument("--t-init", type=number, default=0.2, help="first temperature, or 'auto'")
    parser.add_argument("--t-min", type=float, default=0.03, help="last temperature")
    parser.add_argument(
        "--schedule",
        choices=["exponential", "cosine"],
        default="exponential",
        help="how the temperature falls from the first to the last",
    )
    parser.add_argument(
        "--lr",
        type=number,
        default="auto",
        help="peak learning rate of latents; auto lets noise alone move them by 0.14 "
        "sigma, and is at most 0.015",
    )
    parser.add_argument(
        "--lr-end", type=float, default=0.1, help="what all rates end at, over their peaks"
    )
    parser.add_argument(
        "--scale-lr", type=float, default=5e-3, help="of scales and norms, over each one's size"
    )
    parser.add_argument("--table-lr", type=float, default=1e-3, help="of the table, likewise")
    parser.add_argument(
        "--optimizer",
        choices=["adamw", "adamw8bit"],
        default="adamw",
        help="adamw8bit keeps its moments in a byte each and needs torchao",
    )
    parser.add_argument("--clip", type=float, help="largest norm of all gradients")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps (per stage); 240 without --minutes"
    )
    parser.add_argument(
        "--minutes", type=float, help="end the run, with its schedules, after so much time"
    )
    parser.add_argument("--warmup", type=int, default=5, help="steps of linear warm-up")
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument(
        "--micro-batch", type=int, help="windows that pass the model at once; all by default"
    )
    parser.add_argument(
        "--ctx",
        type=int,
        help="tokens per window (default: 1024, or all positions of a model that has fewer)",
    )
    parser.add_argument("--windows", type=int, help="use at most so many windows of the text")
    parser.add_argument(
        "--teacher-share",
        metavar="SHARE",
        type=float,
        help="of the windows those that the teacher writes, where --data names 'teacher' beside "
        "other text, which gives the rest (default: 0.5)",
    )
    parser.add_argument(
        "--shift-windows",
        action=argparse.BooleanOptionalAction,
        help="after the first epoch cut the text into windows elsewhere, so that it is learned by "
        "heart less; by default where no layer before the trained ones has to run again for it",
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=16,
        help="windows of the text's last documents that only choose the step whose code is kept",
    )
    parser.add_argument(
        "--checkpoint-layers",
        action="store_true",
        help="recompute activations in the backward pass: less memory, more time",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="run decoder layers through torch.compile: a minute at the start, then faster steps",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="repeat passes as CUDA graphs: faster steps where they have few tokens; on a GPU",
    )
    parser.add_argument(
        "--viterbi-every",
        metavar="N",
        type=int,
        default=1,
        help="steps between searches for the hard codes that estimator identity takes",
    )
    every = (
        ("--reencode-every", 25, "moves of the paths' ends"),
        ("--measure-every", 5, "measurements of drift and changed codes"),
        ("--evaluate-every", 20, "evaluations on the held-out windows"),
        ("--save-every", 0, "saved states, which --resume goes on from, besides --save-minutes"),
    )
    for option, default, what in every:
        parser.add_argument(
            option, metavar="N", type=int, default=default, help=f"steps between {what}; 0 is never"
        )
    parser.add_argument(
        "--save-minutes",
        type=float,
        default=3.0,
        help="time between saved states; 0 is never",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text")
    parser.add_argument("--tensorboard", action="store_true", help="also log for TensorBoard")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    add_device(parser, "what trains")
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="of the models' matrix products; auto is bfloat16 on a GPU, float32 on a CPU",
    )
    add_backend(parser)
    parser.set_defaults(run=run)


def config_of(options: argparse.Namespace) -> DistillConfig:
    """What the options ask for; ValueError for options that make no sense."""
    from softtrellis.recipes.qat import DistillConfig

    steps = options.steps
    if steps is None and options.minutes is None:
        steps = DistillConfig.steps
    return DistillConfig(
        layers=layers_of(options.layers),
        mode=options.mode,
        estimator=options.estimator,
        mix=options.mix,
        bcjr_stride=options.bcjr_stride,
        finish=options.finish,
        finish_share=options.finish_share,
        start=options.start,
        train=tuple(part.strip() for part in options.train.split(",") if part.strip()),
        t_init=options.t_init,
        t_min=options.t_min,
        schedule=options.schedule,
        lr=options.lr,
        lr_end=options.lr_end,
        scale_lr=options.scale_lr,
        table_lr=options.table_lr,
        optimizer=options.optimizer,
        clip=options.clip,
        steps=steps,
        minutes=options.minutes,
        warmup=options.warmup,
        batch=options.batch,
        micro_batch=options.micro_batch,
        ctx=options.ctx,
        data=tuple(options.data),
        windows=options.windows,
        teacher_share=options.teacher_share,
        shift_windows=options.shift_windows,
        held_out=options.held_out,
        evaluate_every=options.evaluate_every,
        checkpoint_layers=options.checkpoint_layers,
        compile=options.compile,
        cuda_graphs=options.cuda_graphs,
        viterbi_every=options.viterbi_every,
        reencode_every=options.reencode_every,
        measure_every=options.measure_every,
        save_every=options.save_every,
        save_minutes=options.save_minutes,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        backend=options.backend,
        tensorboard=options.tensorboard,
        show_progress=True,
    )


def run(options: argparse.Namespace) -> int:
    """Trains and saves."""
    from softtrellis.io.checkpoint import describe_sizes
    from softtrellis.recipes.pipeline import train_to

    with usage_errors(options):
        config = config_of(options)
    check_backend(options.backend, options.device)
    output = Path(options.output)
    check_inputs(output, options.checkpoint, options.teacher, data=options.data)
    with joined(options.device) as ranks:
        result = train_to(
            Path(options.checkpoint),
            options.teacher,
            config,
            output,
            force=options.force,
            resume=options.resume,
            ranks=ranks,
        )
    if not ranks.first:
        return 0
    first, last = result.history[0], result.history[-1]
    changed = sum(result.changed_codes.values()) / len(result.changed_codes)
    print(
        f"{len(result.history)} steps in {last['seconds']:.0f} s: loss {first['loss']:.4f} to "
        f"{last['loss']:.4f}, {changed:.2%} of codes changed"
    )
    for stage, best in enumerate(result.kept):
        print(_kept(best, [record for record in result.history if record["stage"] == stage]))
    print(describe_sizes(output))
    following = ["eval", options.teacher, options.checkpoint, str(output), "--data", "pydoc"]
    print(f"Next: softtrellis {shlex.join(following)}")
    return 0


def _kept(best: tuple[int, float] | None, records: Sequence[Mapping[str, Any]]) -> str:
    """Which step's code a stage kept, in words.

    Args:
        best: as in ``DistillResult.kept``.
        records: of the stage, as in ``DistillResult.history``.
    """
    from softtrellis.recipes.trainer import START

    last = records[-1].get("heldout_kl_hard")
    if best is None:
        why = "nothing was measured" if last is None else "no KL was a finite number"
        return f"kept the last step's code, unseen: {why} on held-out text"
    step, divergence = best
    kl = f"KL {divergence:.4f} nats per token"
    if last is not None and step + 1 != len(records):
        kl += f"; the last step's {last:.4f}"
    if step == START:
        return f"kept the code it started from: no step was better on held-out text ({kl})"
    return f"kept the code of step {step + 1}, held-out {kl}"
