"""softtrellis report"""

from __future__ import annotations

import argparse
from pathlib import Path

from softtrellis.cli.common import Commands, command


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "report",
        "write report.html and main.png from a run's log and results",
        "softtrellis report runs/quickstart",
    )
    parser.add_argument("directory", metavar="RUN", help="a run's directory")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes the report."""
    from softtrellis.evaluation.report import write_report

    print(write_report(Path(options.directory)))
    return 0
