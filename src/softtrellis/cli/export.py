"""softtrellis export"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from softtrellis.cli.common import (
    Commands,
    UsageError,
    add_output,
    check_inputs,
    command,
    usage_errors,
)

if TYPE_CHECKING:
    from softtrellis.io.exl3_export import Exl3Sizes

NAMED = 3


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "export",
        "write a checkpoint for exllamav3 (EXL3), or with dense weights for transformers",
        "softtrellis export smollm2-exl3-profile --format exl3 -o smollm2-exl3",
        "EXL3 takes a checkpoint made with 'quantize --profile exl3', and keeps its bits.",
    )
    parser.add_argument("checkpoint", help="a checkpoint's directory")
    parser.add_argument(
        "--format",
        choices=["exl3", "dense"],
        required=True,
        help="exl3 for exllamav3; dense for transformers and whatever reads its models",
    )
    add_output(parser, "the model")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of dense weights; bfloat16 by default",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="with exl3, write linear layers that are not quantized as plain float16 weights; "
        "without it they are refused",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Exports, and says what was written."""
    from softtrellis.io.files import check_output
    from softtrellis.recipes.exchange import ExportConfig, export_to

    if options.format == "exl3" and options.dtype is not None:
        raise UsageError("--dtype needs --format dense; EXL3 has float16 only")
    if options.format == "dense" and options.partial:
        raise UsageError("--partial needs --format exl3; dense models hold all layers alike")
    output = Path(options.output)
    check_inputs(output, options.checkpoint)
    check_output(output, force=options.force)
    with usage_errors(options):
        config = ExportConfig(options.format, options.dtype or "bfloat16", options.partial)
    found = export_to(Path(options.checkpoint), config, output, force=options.force)
    if isinstance(found, int):
        print(f"dense weights in {config.dtype}, {found:,} bytes")
    else:
        print(describe(found))
    print(output)
    return 0


def describe(sizes: Exl3Sizes) -> str:
    """The sizes in words."""
    lines = [
        f"EXL3, {sizes.layers} layers of {sizes.weights:,} weights: "
        f"trellis {sizes.trellis_bits:.4f} bits per weight"
    ]
    if sizes.padded_layers:
        lines.append(f"{sizes.padded_layers} of them padded to multiples of 128, which is counted")
    if sizes.unquantized:
        more = ", ..." if len(sizes.unquantized) > NAMED else ""
        names = ", ".join(sizes.unquantized[:NAMED]) + more
        lines.append(f"{len(sizes.unquantized)} linear layers in float16: {names}")
    return "\n".join(lines)
