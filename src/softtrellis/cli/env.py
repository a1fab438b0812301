"""softtrellis env"""

from __future__ import annotations

import argparse

from softtrellis.cli.common import Commands, command


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands, "env", "print versions and devices, for bug reports", "softtrellis env"
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Prints one line per fact."""
    from softtrellis.recipes.environment import environment

    for name, value in environment().items():
        print(f"{name:14} {value}")
    return 0
