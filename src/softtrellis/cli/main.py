"""The command ``softtrellis``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from softtrellis import __version__
from softtrellis.cli import (
    bench,
    env,
    evaluate,
    export,
    generate,
    import_,
    inspect,
    plan,
    quantize,
    quickstart,
    report,
    train,
)
from softtrellis.cli.common import UsageError
from softtrellis.cli.logged import warnings_shown
from softtrellis.io.errors import is_disk_full, is_out_of_memory
from softtrellis.io.interrupts import Terminated, termination

FAILURE, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
LESS_MEMORY = {
    "quantize": "lower --batch, --windows or --ctx",
    "train": "lower --micro-batch or --ctx, add --checkpoint-layers, or train fewer --layers",
    "eval": "lower --ctx",
    "generate": "lower --max-tokens",
    "chat": "lower --max-tokens",
    "plan": "lower --tiles",
    "bench": "lower --tiles",
}
"""By command, what to change when memory runs out."""


class _Parser(argparse.ArgumentParser):
    """Wrong options become a UsageError, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="softtrellis",
        description="2-bit language models by trellis-coded quantization, trained through the "
        "trellis (QTIP, BCJR-QAT).",
    )
    parser.add_argument("--version", action="version", version=f"softtrellis {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    work = quickstart, quantize, plan, train, evaluate, generate
    for module in (*work, inspect, export, import_, report, bench, env):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 for a failure, 2 for wrong usage."""
    debug, command = False, ""
    try:
        options, unknown = build_parser().parse_known_args(arguments)
        debug, command = options.debug, options.command
        if unknown:
            words = " ".join(unknown)
            raise UsageError(f"unrecognized arguments: {words}; see softtrellis {command} --help")
        with termination(), warnings_shown():
            code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        what = "terminated" if terminated else "interrupted"
        print("; ".join([f"softtrellis: {what}", *_notes(error)]), file=sys.stderr)
        return TERMINATED if terminated else INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough
        _abandon_output()
        return FAILURE
    except Exception as error:
        if debug:
            traceback.print_exc()
        words = "; ".join([_in_words(error, command), *_notes(error)])
        print(f"softtrellis: error: {words}", file=sys.stderr)
        _abandon_output()
        return USAGE if _is_usage(error) else FAILURE


def _abandon_output() -> None:
    """Keeps the interpreter from failing, at its end, on output that cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def _is_usage(error: Exception) -> bool:
    if isinstance(error, UsageError):
        return True
    # These modules are loaded only if the command got far enough to raise from them.
    usage = {
        "softtrellis.evaluation.harness": "UnknownTaskError",
        "softtrellis.io.files": "OutputExists",
        "softtrellis.modules.replace": "UnknownLayerError",
    }
    return any(
        isinstance(error, getattr(sys.modules[module], name))
        for module, name in usage.items()
        if module in sys.modules
    )


def _in_words(error: Exception, command: str) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if is_disk_full(error):
        return f"the disk is full ({text}); free some space and repeat the command"
    if is_out_of_memory(error):
        remedy = LESS_MEMORY.get(command, "use a smaller model")
        return f"out of memory ({text or 'no details'}); {remedy}"
    if isinstance(error, ValueError | OSError | ImportError) or _is_usage(error):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (--debug shows where)"
