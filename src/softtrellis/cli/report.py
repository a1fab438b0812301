"""softtrellis report"""

from __future__ import annotations

import argparse
from pathlib import Path

from softtrellis.cli.common import Commands, UsageError, command


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "report",
        "write a page with pictures from the logs and results of one run or of several",
        "softtrellis report runs/identity runs/soft -o comparison.html",
        "Of one run it writes report.html and main.png into its directory. Several are shown side "
        "by side, each compared with the first.",
    )
    parser.add_argument("directories", nargs="+", metavar="RUN", help="a run's directory")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE.html",
        help="where the page goes, with a PNG of the same name beside it; needed for several runs",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes the report."""
    from softtrellis.evaluation.comparison_report import write_comparison
    from softtrellis.evaluation.report import write_report

    output = _check_output(options.output)
    if len(set(options.directories)) != len(options.directories):
        raise UsageError("a run is named twice; name each once")
    directories = [Path(name) for name in options.directories]
    if len(directories) == 1:
        print(write_report(directories[0], output))
    elif output is None:
        raise UsageError("several runs need -o FILE.html; name the page to write")
    else:
        print(write_comparison(directories, output))
    return 0


def _check_output(name: str | None) -> Path | None:
    if name is None:
        return None
    output = Path(name)
    if output.suffix != ".html" or output.is_dir() or not output.parent.is_dir():
        raise UsageError(
            f"--output must be a file NAME.html in a directory that exists, got {name}"
        )
    return output
