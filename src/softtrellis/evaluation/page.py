"""A report's page: its tables and figures as HTML, written whole together with a picture."""

import os
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from softtrellis.evaluation.figures import Plot


def html_table(
    headings: Sequence[str],
    lines: Iterable[Sequence[str]],
    style: str = "",
    marks: Sequence[str] = (),
) -> str:
    """A table whose first column names the lines.

    Args:
        headings: one per column; none for a table without a head.
        lines: the cells of each line, as text.
        style: the table's class.
        marks: HTML in front of the names of the first lines.
    """
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headings)
    body = []
    for number, line in enumerate(lines):
        mark = marks[number] if number < len(marks) else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in line[1:])
        body.append(f'<tr><th scope="row">{mark}{escape(line[0])}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="{style}">'
        + (f"<thead><tr>{head}</tr></thead>" if head else "")
        + f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def html_figures(plots: Iterable[Plot]) -> str:
    """The figures in a grid, each with its caption."""
    parts = []
    for plot in plots:
        label = escape(plot.alt, quote=True)
        svg = plot.svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        wide = ' class="wide"' if plot.wide else ""
        parts.append(f"<figure{wide}>{svg}<figcaption>{escape(plot.caption)}</figcaption></figure>")
    return f'<div class="plots">{"".join(parts)}</div>'


def write_page(
    target: Path,
    picture: Path,
    *,
    title: str,
    body: Iterable[str],
    draw_picture: Callable[[Path], bool],
    style: str = "",
) -> None:
    """Write the page and the picture beside it, both whole or not at all.

    Args:
        target: the HTML file.
        picture: the PNG; removed if there is nothing to draw.
        title: as text.
        body: the HTML below the title.
        draw_picture: writes a PNG; returns False, without a file, if nothing is there to draw.
        style: the body's class.
    """
    page = Template(files(__package__).joinpath("report_template.html").read_text("utf-8"))
    text = page.substitute(title=escape(title), body="\n".join(body), style=style)
    half_page, half_picture = (path.with_name(f".{path.name}.part") for path in (target, picture))
    try:
        half_page.write_text(text, "utf-8")
        if draw_picture(half_picture):
            os.replace(half_picture, picture)
        else:
            picture.unlink(missing_ok=True)
        os.replace(half_page, target)
    finally:
        half_page.unlink(missing_ok=True)
        half_picture.unlink(missing_ok=True)
