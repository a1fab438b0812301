"""softtrellis quantize"""

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
    usage_errors,
)


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "quantize",
        "quantize a model after training (QTIP: Hessians, incoherence, LDLQ, Viterbi)",
        "softtrellis quantize smollm2-135m-instruct -o smollm2-2bit --layers 28,29 --L 12",
    )
    parser.add_argument(
        "model", help="Hugging Face id or directory, GGUF file, or smollm2-135m-instruct"
    )
    add_output(parser, "the checkpoint")
    parser.add_argument(
        "--profile",
        choices=["qtip", "exl3"],
        default="qtip",
        help="which family of codes and rotations",
    )
    parser.add_argument("--bits", type=int, default=2, help="bits per weight, 1 to 4")
    parser.add_argument(
        "--code",
        help="qtip: hyb (default), 1mad, 3inst, mul1, mcg, gaussian; "
        "exl3: mul1 (default), mcg, 3inst",
    )
    parser.add_argument("--L", type=int, default=16, help="bits of a trellis state, up to 16")
    add_layers(parser)
    add_data(parser, "calibration text")
    parser.add_argument("--ctx", type=int, default=512, help="tokens per calibration window")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument(
        "--damping",
        type=float,
        default=0.01,
        help="added to the Hessians' diagonals, as a share of their mean",
    )
    parser.add_argument(
        "--no-hessian", action="store_true", help="plain Viterbi, without error feedback"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random signs of the rotations")
    add_backend(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Quantizes and saves."""
    from softtrellis.io.checkpoint import describe_sizes
    from softtrellis.io.files import check_output
    from softtrellis.recipes.pipeline import quantize_to
    from softtrellis.recipes.ptq import QuantizeConfig

    with usage_errors(options):
        config = QuantizeConfig(
            profile=options.profile,
            bits=options.bits,
            code=options.code,
            L=options.L,
            layers=layers_of(options.layers),
            data=tuple(options.data),
            ctx=options.ctx,
            windows=options.windows,
            damping=options.damping,
            error_feedback=not options.no_hessian,
            seed=options.seed,
            backend=options.backend,
            show_progress=True,
        )
    check_backend(options.backend)
    output = Path(options.output)
    check_inputs(output, options.model)
    check_output(output, force=options.force)
    reports = quantize_to(options.model, config, output, force=options.force)
    print(f"{'layer':45}  proxy loss  weight error")
    for name, report in reports.items():
        print(f"{name:45}  {report.proxy_loss:10.4f}  {report.error:12.4f}")
    print(describe_sizes(output))
    following = ["train", str(output), "--teacher", options.model, "-o", f"{output}-trained"]
    print(f"Next: softtrellis {shlex.join(following)}")
    return 0
