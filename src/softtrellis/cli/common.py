"""What the commands share."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softtrellis.backend import Backend
    from softtrellis.recipes.ranks import Ranks

Commands = Any
"""argparse's action that sub-parsers are added to."""


class UsageError(Exception):
    """Options that make no sense."""


@contextmanager
def usage_errors(options: argparse.Namespace) -> Iterator[None]:
    """Turns a ValueError from validating a configuration into a usage error.

    A field that has an option's name is called by it: "t_min must be ..." becomes "--t-min ...".
    """
    try:
        yield
    except ValueError as error:
        field, must, rest = str(error).partition(" must ")
        name = {"k": "bits", "eval_windows": "windows"}.get(field, field)
        if must and hasattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')} must {rest}") from error
        raise UsageError(str(error)) from error


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """``join``, with which rank 0 alone says what went wrong where all stop together."""
    from softtrellis.recipes.ranks import FirstRankFailed, join

    with join(device) as ranks:
        try:
            yield ranks
        except (FirstRankFailed, KeyboardInterrupt):
            if ranks.first:
                raise
            raise SystemExit(1) from None


def check_inputs(output: Path, *inputs: str, data: Sequence[str] = ()) -> None:
    """UsageError if the output is one of the inputs, lies in one or holds one.

    ``--force`` would delete an input that is the output or in it, and an output in an input would
    become a part of it.

    Args:
        output: the output directory.
        inputs: models and checkpoints; what does not exist is a name on a hub.
        data: sources of text, as ``--data`` takes them.
    """
    from softtrellis.io.files import partial_path
    from softtrellis.io.text import path_of

    place = output.resolve()
    models = [Path(name) for name in inputs if Path(name).exists()]
    for source in (path.resolve() for path in models):
        if place == source or (place.exists() and place.samefile(source)):
            raise UsageError(f"{output} is also the input; choose another output directory")
        if place.is_relative_to(source):
            raise UsageError(f"{output} is inside the input; choose another output directory")
    texts = [path for path in map(path_of, data) if path is not None and path.exists()]
    for path in (*models, *texts):
        for folder in (output, partial_path(place)):
            if folder.resolve() in path.resolve().parents:
                raise UsageError(
                    f"the input {path} is inside {folder}; choose another output directory"
                )


def check_json(name: str | None) -> None:
    """UsageError if ``--json`` cannot be written, before the work is done."""
    if name and (Path(name).is_dir() or not Path(name).parent.is_dir()):
        raise UsageError(f"--json must be a file in a directory that exists, got {name}")


def command(
    commands: Commands, name: str, summary: str, example: str, details: str = ""
) -> argparse.ArgumentParser:
    """A sub-parser with the options that all commands have, and an example in its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(f"{summary[0].upper()}{summary[1:]}. {details}", 79),
        epilog=f"example:\n  {example}",
        formatter_class=_Formatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except where there is none, and keeps the example's lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or not action.option_strings:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)


class _Extend(argparse.Action):
    """Collects the values of every time an option is given, in place of its default.

    argparse's own ``extend`` would put them behind the default.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        known = getattr(namespace, self.dest)
        given = list(values or ())
        setattr(namespace, self.dest, given if known is self.default else [*known, *given])


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


def add_data(parser: argparse.ArgumentParser, purpose: str, *, teacher: str | None = None) -> None:
    """``--data``; with ``teacher``, which says beside what, also text that the teacher writes."""
    written = ""
    if teacher is not None:
        written = f"; or 'teacher', {teacher}: text that the full-precision model writes"
    parser.add_argument(
        "--data",
        metavar="TEXT",
        nargs="+",
        action=_Extend,
        default=["pydoc"],
        help=f"{purpose}: UTF-8 text files (documents:FILE if blank lines part its documents), "
        "chats or texts in .jsonl files, a data set on the Hugging Face hub as "
        "hf:NAME[,CONFIG][:SPLIT[:FIELD]], 'wikitext2', or 'pydoc' (the interpreter's own "
        f"documentation, split by topic into training and held-out parts){written}",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """``--backend``."""
    parser.add_argument(
        "--backend",
        choices=["auto", "torch", "cpu", "triton", "cuda"],
        default="auto",
        help="what runs the trellis; auto takes the fastest that fits the device",
    )


def add_device(parser: argparse.ArgumentParser, purpose: str) -> None:
    """``--device``."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=purpose)


def check_backend(backend: Backend, device: str = "cpu") -> None:
    """UsageError if there is no such device, or the backend cannot run on its float32 tensors."""
    import torch

    from softtrellis.backend import resolve_backend

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device must be cpu: torch finds no CUDA device here")
    try:
        resolve_backend(backend, torch.empty(0, device=device))
    except (RuntimeError, ValueError) as error:
        raise UsageError(str(error)) from error


def number(value: str) -> float | str:
    """A number, or "auto"."""
    return value if value == "auto" else float(value)
