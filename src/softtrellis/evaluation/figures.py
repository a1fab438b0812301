"""Figures for a report: SVG in the page's text colour, or a PNG on white."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = "#808890"
PAGE_TEXT = "#010203"
"""Stands for the page's text colour until the SVG is written."""
PNG_TEXT = "#20262c"


@dataclass(frozen=True)
class Plot:
    """One figure of a report: inline SVG, the text read out in its stead, and a caption."""

    svg: str
    alt: str
    caption: str
    wide: bool = False


@contextmanager
def new_figure(width: float, height: float, text: str = PAGE_TEXT) -> Iterator["Figure"]:
    """An empty figure in the reports' style.

    Args:
        width: inches.
        height: inches.
        text: colour of text and axes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.edgecolor": text,
            "axes.labelcolor": text,
            "axes.titlecolor": text,
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": GREY,
            "grid.alpha": 0.25,
            "text.color": text,
            "xtick.color": text,
            "ytick.color": text,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "svg.fonttype": "none",
            "svg.hashsalt": "softtrellis",
        }
    ):
        yield Figure(figsize=(width, height), layout="constrained")


def svg_of(figure: "Figure") -> str:
    """The figure as an ``<svg>`` element; what is drawn in PAGE_TEXT takes the page's colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", text))  # the others would repeat from figure to figure
    text = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", text)
    return text.replace(PAGE_TEXT, "currentColor")
