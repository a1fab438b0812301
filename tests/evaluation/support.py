"""Runs as training and evaluation leave them, and a reader of the pages made from them."""

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

LAYERS = [
    f"model.layers.{i}.{part}"
    for i in range(2)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
ROWS: list[dict[str, Any]] = [
    {"name": "full precision", "perplexity": 21.63, "kl": 0.0, "bits_per_weight": 32.0, "bytes": 9},
    {"name": "PTQ", "perplexity": 66.4, "kl": 1.0987, "bits_per_weight": 2.04, "bytes": 34_567_890},
    {"name": "BCJR-QAT", "perplexity": 36.51, "kl": 0.5, "bits_per_weight": 2.04, "bytes": 345},
]


def training_log(steps: int = 60, *, measure: bool = True) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def measured(step: int, scale: float) -> dict[str, float]:
        share = (step / steps) ** 2 * 0.03 * scale
        return {
            "drift": 0.08 * scale * (step / steps) ** 0.7,
            "drift_max": 0.5 * scale * (step / steps) ** 0.7,
            "changed_codes": share,
            "changed_tiles": min(1.0, 20 * share),
            "entropy": 2.5 * math.exp(-2 * step / steps),
            "soft_hard_gap": 0.2 * math.exp(-step / steps),
        }

    log = []
    for step in range(steps + 1):
        record: dict[str, Any] = {
            "step": step,
            "loss": 0.4 + 0.7 * math.exp(-4 * step / steps) + rng.gauss(0, 0.03),
            "temperature": 0.1 * 0.3 ** (step / steps),
            "lr": 1e-2,
            "seconds": 1.5 * step,
            "grad_norm": 1.0,
        }
        if measure and step % 5 == 0:
            record |= measured(step, 1.0)
            record["layers"] = {n: measured(step, 0.6 + 0.1 * i) for i, n in enumerate(LAYERS)}
        log.append(record)
    return log


def results(mean: float = -0.6, spread: float = 0.05, windows: int = 40) -> dict[str, Any]:
    rng = random.Random(1)
    tokens = [2047] * windows
    base = [max(0.2, rng.gauss(1.1, 0.2)) for _ in range(windows)]
    scores = {"full precision": [0.0] * windows, "PTQ": base}
    scores["BCJR-QAT"] = [max(0.01, b + mean * rng.uniform(0.6, 1.4)) for b in base]
    return {
        "title": "SmolLM2-135M-Instruct, 2 bits",
        "rows": [dict(row) for row in ROWS],
        "windows": {
            name: {"nll": [3.0 * n for n in tokens], "kl": [k * 2047 for k in kl], "tokens": tokens}
            for name, kl in scores.items()
        },
        "comparisons": [
            {
                "a": "BCJR-QAT",
                "b": "PTQ",
                "metric": "kl",
                "mean": mean,
                "low": mean - spread,
                "high": mean + spread,
            }
        ],
        "predicted_radius": 0.00623,
        "settings": {"L": 12, "profile": "qtip", "layers": "12-17", "lr": 0.01},
        "environment": {"torch": "2.13.0", "cpu": "2 cores"},
    }


def write_run(
    directory: Path,
    log: list[dict[str, Any]] | None = None,
    content: dict[str, Any] | None = None,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if log is not None:
        lines = "".join(json.dumps(record) + "\n" for record in log)
        (directory / "log.jsonl").write_text(lines, encoding="utf-8")
    if content is not None:
        (directory / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


class Page(HTMLParser):
    """Collects the tags, the visible text and the attributes that could load something."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
