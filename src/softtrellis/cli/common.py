"""What the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Commands = Any
"""argparse's action that sub-parsers are added to."""


class UsageError(Exception):
    """Options that make no sense."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns a ValueError, from validating a configuration for instance, into a usage error."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def command(
    commands: Commands, name: str, summary: str, example: str, details: str = ""
) -> argparse.ArgumentParser:
    """A sub-parser with the options that all commands have, and an example in its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.{details and ' ' + details}",
        epilog=f"example:\n  {example}",
        formatter_class=_Formatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except where there is none, and keeps the example's lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or not action.option_strings:
            return action.help
        return super()._get_help_string(action)


def add_output(parser: argparse.ArgumentParser, what: str, default: str | None = None) -> None:
    """``-o`` and ``--force``."""
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        required=default is None,
        default=default,
        help=f"where {what} goes; refused if it exists",
    )
    parser.add_argument("--force", action="store_true", help="replace an output that exists")


def add_layers(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """``--layers``."""
    parser.add_argument(
        "--layers",
        metavar="A,B,...",
        default=default,
        help="linear layers: a decoder layer's number (28), a range (10-12), the end of a name "
        "(mlp.down_proj) or a shell pattern ('*.27.mlp.*'); all by default",
    )


def layers_of(value: str | None) -> tuple[str, ...] | None:
    """The patterns of ``--layers``."""
    if value is None:
        return None
    patterns = tuple(part.strip() for part in value.split(",") if part.strip())
    if not patterns:
        raise UsageError("--layers is empty; name some, or leave it out for all")
    return patterns


def add_data(parser: argparse.ArgumentParser, purpose: str) -> None:
    """``--data``."""
    parser.add_argument(
        "--data",
        metavar="TEXT",
        nargs="+",
        default=["pydoc"],
        help=f"{purpose}: UTF-8 text files, 'wikitext2', or 'pydoc' (the interpreter's own "
        "documentation, split by topic into training and held-out parts)",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """``--backend``."""
    parser.add_argument(
        "--backend", choices=["auto", "torch", "cpu", "triton"], default="auto", help="trellis code"
    )


def temperature(value: str) -> float | str:
    """A number, or "auto"."""
    return value if value == "auto" else float(value)
