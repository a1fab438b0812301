"""The command ``softtrellis``."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from softtrellis import __version__
from softtrellis.cli import env, evaluate, inspect, quantize, quickstart, report, train
from softtrellis.cli.common import UsageError

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="softtrellis",
        description="2-bit language models by trellis-coded quantization, trained through the "
        "trellis (QTIP, BCJR-QAT).",
    )
    parser.add_argument("--version", action="version", version=f"softtrellis {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (quickstart, quantize, train, evaluate, inspect, report, env):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 for a failure, 2 for wrong usage."""
    options = build_parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except KeyboardInterrupt:
        print("softtrellis: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        print(f"softtrellis: error: {_one_line(error)}", file=sys.stderr)
        return USAGE if _is_usage(error) else FAILURE


def _is_usage(error: Exception) -> bool:
    if isinstance(error, UsageError):
        return True
    # These modules are loaded only if the command got far enough to raise from them.
    usage = {
        "softtrellis.io.files": "OutputExists",
        "softtrellis.modules.replace": "UnknownLayerError",
    }
    return any(
        isinstance(error, getattr(sys.modules[module], name))
        for module, name in usage.items()
        if module in sys.modules
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    known = isinstance(error, ValueError | OSError | ImportError) or _is_usage(error)
    return text if known else f"{type(error).__name__}: {text} (--debug shows where)"
