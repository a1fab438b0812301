"""softtrellis import"""

from __future__ import annotations

import argparse
from pathlib import Path

from softtrellis.cli.common import Commands, add_output, check_inputs, command


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "import",
        "read a model of EXL3 or QTIP into a checkpoint with the same bits",
        "softtrellis import llama-exl3 -o llama-2bit --base meta-llama/Llama-3.2-1B",
        "Layers of up to 4 bits keep their bits; others, often the output layer, become dense. "
        "QTIP's need --base, and not all can be read: docs/export.md says which.",
    )
    parser.add_argument("source", help="the directory of a model of EXL3 or QTIP")
    add_output(parser, "the checkpoint")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the full-precision model it was made from: each layer is compared with it, and "
        "'train' takes it as --teacher",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Imports, and says what was found."""
    from softtrellis.io.checkpoint import describe_sizes
    from softtrellis.io.files import check_output
    from softtrellis.recipes.exchange import import_from

    output = Path(options.output)
    check_inputs(output, options.source, *([options.base] if options.base else []))
    check_output(output, force=options.force)
    report = import_from(Path(options.source), output, base=options.base, force=options.force)
    print(f"{report.layers} layers with the same bits")
    for name, bits in report.decoded.items():
        print(f"{name} has {bits} bits, more than codes here have: stored dense, in float32")
    if report.rounded:
        print(f"{len(report.rounded)} of them with scales of output channels rounded to float16")
    if report.correlations:
        name = min(report.correlations, key=lambda each: report.correlations[each])
        print(f"correlation with the base model at least {report.correlations[name]:.4f} ({name})")
    print(describe_sizes(output))
    print(output)
    return 0
