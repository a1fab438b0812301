"""softtrellis quantize"""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from softtrellis.cli.common import (
    Commands,
    UsageError,
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
    usage_errors,
)

if TYPE_CHECKING:
    from softtrellis.recipes.end_to_end import EndToEndConfig
    from softtrellis.recipes.finetune import FineTuneConfig
    from softtrellis.recipes.group import LayerReport
    from softtrellis.recipes.progressive import ProgressiveConfig
    from softtrellis.recipes.ptq import QuantizeConfig

PROXY_NOTED, DAMPING_NOTED, OUTLIER_NOTED = 3.0, 0.05, 40.0


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
        "--bits-map",
        type=bits_map,
        metavar="A=N,...",
        default=(),
        help="layers with other bits, named as for --layers: 'down_proj=3,0-1=4'; of several that "
        "match the last counts",
    )
    parser.add_argument(
        "--code",
        help="qtip: hyb (default), 1mad, 3inst, mul1, mcg, gaussian, scalar; "
        "exl3: mul1 (default), mcg, 3inst",
    )
    parser.add_argument(
        "--L",
        type=int,
        help="bits of a trellis state, up to 16; 16 by default, and 8 with --code scalar, which "
        "has no trellis",
    )
    parser.add_argument(
        "--head-bits", type=int, help="quantize the output layer too, to so many bits"
    )
    add_layers(parser)
    parser.add_argument("--skip", metavar="A,B,...", help="layers that stay as they are")
    add_data(parser, "calibration text", teacher="alone")
    parser.add_argument("--ctx", type=int, default=512, help="tokens per calibration window")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument(
        "--batch", type=int, help="windows that run at once; by default as many as suit the device"
    )
    parser.add_argument(
        "--inputs",
        choices=["corrected", "quantized", "original"],
        default="corrected",
        help="take Hessians from the output of the layers before as they are quantized, or of the "
        "original ones; corrected is quantized, with weights first changed to make up for the "
        "errors of these layers",
    )
    parser.add_argument(
        "--damping",
        type=float,
        default=0.01,
        help="added to the Hessians' diagonals, as a share of their mean",
    )
    parser.add_argument(
        "--correction-damping",
        type=float,
        default=0.1,
        help="likewise, where weights are corrected",
    )
    parser.add_argument(
        "--output-windows",
        type=int,
        default=0,
        metavar="N",
        help="also take Hessians of the layers' outputs, from gradients on so many of the "
        "calibration windows, and feed errors along outputs too (YAQA); the whole model has to "
        "fit on the device",
    )
    parser.add_argument(
        "--output-damping", type=float, default=0.1, help="likewise, of the outputs' Hessians"
    )
    parser.add_argument(
        "--no-hessian", action="store_true", help="plain Viterbi, without error feedback"
    )
    parser.add_argument(
        "--fine-tune",
        action="store_true",
        help="tune what is left of every block, and the scales, to the original block's output",
    )
    parser.add_argument("--epochs", type=int, help="of --fine-tune, for every group; 5 by default")
    parser.add_argument(
        "--lr",
        type=float,
        help="of --fine-tune, for weights, over the root mean square of each matrix; 0.01 by "
        "default",
    )
    parser.add_argument(
        "--end-to-end",
        type=int,
        metavar="EPOCHS",
        help="afterwards tune the scales and norms of the whole model to the original model's "
        "predictions",
    )
    parser.add_argument(
        "--scale-lr",
        type=float,
        help="of --fine-tune, for scales, norms and biases, likewise; 0.003 by default",
    )
    parser.add_argument(
        "--progressive",
        type=int,
        metavar="STEPS",
        help="after every decoder layer train those behind it, in full precision, so many steps "
        "towards the original model's predictions",
    )
    parser.add_argument(
        "--progressive-data",
        nargs="+",
        metavar="TEXT",
        help="text for that, without what train holds out of the same text; by default the "
        "calibration windows",
    )
    parser.add_argument(
        "--progressive-lr",
        type=float,
        help="of it, for weights, over the root mean square of each matrix; 0.01 by default",
    )
    parser.add_argument(
        "--progressive-ctx", type=int, help="of its text, tokens per window; 1024 by default"
    )
    parser.add_argument(
        "--progressive-batch", type=int, help="of it, windows per step; 16 by default"
    )
    parser.add_argument(
        "--progressive-micro-batch",
        type=int,
        help="of it, windows that pass the model at once; 4 by default",
    )
    parser.add_argument(
        "--progressive-compile",
        action="store_const",
        const=True,
        help="of it, run decoder layers through torch.compile: for many steps on a GPU",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random signs of the rotations")
    add_device(parser, "what quantizes; cuda holds one decoder layer at a time")
    add_backend(parser)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be quantized, how long it takes, and what memory and disk it needs",
    )
    parser.set_defaults(run=run)


def bits_map(value: str) -> tuple[tuple[str, int], ...]:
    """ "down_proj=3,0-1=4" as pairs."""
    pairs = [part.rpartition("=") for part in value.split(",")]
    for pattern, _, bits in pairs:
        if not pattern.strip() or not bits.strip().isdecimal():
            raise argparse.ArgumentTypeError(f"name layers and bits as down_proj=3, got {value!r}")
    return tuple((pattern.strip(), int(bits)) for pattern, _, bits in pairs)


def configs(
    options: argparse.Namespace,
) -> tuple[QuantizeConfig, FineTuneConfig | None, ProgressiveConfig | None, EndToEndConfig | None]:
    """What the options ask for; UsageError or ValueError for options that make no sense."""
    from softtrellis.recipes.end_to_end import EndToEndConfig
    from softtrellis.recipes.finetune import FineTuneConfig
    from softtrellis.recipes.progressive import ProgressiveConfig
    from softtrellis.recipes.ptq import QuantizeConfig

    config = QuantizeConfig(
        profile=options.profile,
        bits=options.bits,
        bits_map=options.bits_map,
        head_bits=options.head_bits,
        code=options.code,
        L=options.L,
        layers=layers_of(options.layers),
        skip=layers_of(options.skip) or (),
        data=tuple(options.data),
        ctx=options.ctx,
        windows=options.windows,
        batch=options.batch,
        inputs=options.inputs,
        damping=options.damping,
        correction_damping=options.correction_damping,
        output_windows=options.output_windows,
        output_damping=options.output_damping,
        error_feedback=not options.no_hessian,
        seed=options.seed,
        device=options.device,
        backend=options.backend,
        show_progress=True,
    )
    given = {name: getattr(options, name) for name in ("epochs", "lr", "scale_lr")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not options.fine_tune:
        option = next(iter(given)).replace("_", "-")
        raise UsageError(f"--{option} needs --fine-tune")
    tuning = FineTuneConfig(seed=options.seed, **given)
    whole = None
    if options.end_to_end is not None:
        if options.end_to_end < 1:
            raise ValueError(f"end_to_end must be at least 1, got {options.end_to_end}")
        whole = EndToEndConfig(epochs=options.end_to_end, seed=options.seed)
    behind = None
    names = ("data", "ctx", "lr", "batch", "micro_batch", "compile")
    given = {name: getattr(options, f"progressive_{name}") for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if given and options.progressive is None:
        option = next(iter(given)).replace("_", "-")
        raise UsageError(f"--progressive-{option} needs --progressive")
    if options.progressive is not None:
        if "data" in given:
            given["data"] = tuple(given["data"])
        behind = ProgressiveConfig(steps=options.progressive, seed=options.seed, **given)
    return config, tuning if options.fine_tune else None, behind, whole


def run(options: argparse.Namespace) -> int:
    """Quantizes and saves."""
    from softtrellis.io.checkpoint import describe_sizes
    from softtrellis.io.files import check_output
    from softtrellis.recipes.pipeline import plan_quantization, quantize_to

    with usage_errors(options):
        config, fine_tune, progressive, whole = configs(options)
    check_backend(options.backend, options.device)
    if options.dry_run:
        names, plan = plan_quantization(options.model, config, fine_tune, progressive, whole)
        print("\n".join(names))
        print(plan)
        return 0
    output = Path(options.output)
    texts = [*options.data, *(options.progressive_data or ())]
    check_inputs(output, options.model, data=texts)
    check_output(output, force=options.force)
    with joined(options.device) as ranks:
        reports = quantize_to(
            options.model,
            config,
            output,
            fine_tune=fine_tune,
            progressive=progressive,
            end_to_end=whole,
            force=options.force,
            resume=options.resume,
            ranks=ranks,
        )
    if not ranks.first:
        return 0
    print(f"{'layer':45}  proxy loss  weight error  notes")
    for name, report in reports.items():
        figures = f"{report.proxy_loss:10.4f}  {report.error:12.4f}"
        print(f"{name:45}  {figures}  {notes(report, reports)}".rstrip())
    print(describe_sizes(output))
    following = ["train", str(output), "--teacher", options.model, "-o", f"{output}-trained"]
    print(f"Next: softtrellis {shlex.join(following)}")
    return 0


def notes(report: LayerReport, reports: Mapping[str, LayerReport]) -> str:
    """What is unusual about a layer."""
    typical = statistics.median(other.proxy_loss for other in reports.values())
    times = report.proxy_loss / max(typical, 1e-30)
    found = [
        (times > PROXY_NOTED, f"proxy loss {times:.1f} times the median"),
        (report.damping > DAMPING_NOTED, f"damping grew to {report.damping:g}"),
        (report.borrowed, f"saw {report.tokens} tokens: Hessian of all experts beside it"),
        (report.dead > 0, f"{report.dead} inputs never fire"),
        (report.largest > OUTLIER_NOTED, f"a weight of {report.largest:.0f} standard deviations"),
    ]
    return ", ".join(text for noted, text in found if noted)
