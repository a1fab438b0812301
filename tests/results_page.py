"""docs/results.md and docs/results-history.md as text, and the data behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

Run = dict[str, Any]

DATA = ROOT / "docs" / "results"
PAGE = "".join(
    (ROOT / "docs" / name).read_text("utf-8") for name in ("results.md", "results-history.md")
)
