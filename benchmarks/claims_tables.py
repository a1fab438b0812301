"""Tables of rows 1 to 3 of docs/results.md from the JSON lines of ``claims.py``.

    python benchmarks/claims_tables.py single docs/results/*-claims.jsonl.xz

single: every layer's KL, and what training does to it, or does beyond another estimator
(``--against identity``); pairs: what layers gain together beyond the sum of their single gains;
drift: the share of tiles that changed beside what radii predict. Rates and intervals are those of
``layer_runs.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layer_runs import Setting, changes, moved, unions, wilson
from results_tables import Record, read_records, seeds_in_words, words


def lines(rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table, of which the first row is the head."""
    text = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([text[0], "|---" * (text[0].count("|") - 1) + "|", *text[1:]])


def name_of(setting: Setting) -> list[Any]:
    return [
        " and ".join(map(str, setting.layers)),
        setting.start,
        setting.trainable,
        setting.kind,
    ]


HEAD = ["layers", "start", "trained", "estimator"]


def single_table(records: list[Record], against: str | None) -> str:
    other = against or "PTQ"
    head = [*HEAD, "lr (of)", f"{other}: KL", "KL", f"minus {other}'s, windows", "by seed"]
    return lines([head, *(
        [*name_of(c.setting), f"{c.lr:g} ({c.rates})", f"{c.other:.4f}", f"{c.kl:.4f}",
         words(c.windows), seeds_in_words(c.seeds)]
        for c in changes(records, against)
    )])  # fmt: skip


def pairs_table(records: list[Record]) -> str:
    head = [*HEAD, "gain", "sum of single gains", "more than the sum, windows", "by seed"]
    return lines([head, *(
        [*name_of(u.setting), f"{u.gain:.4f}", f"{u.total:.4f}", words(u.more),
         seeds_in_words(u.seeds)]
        for u in unions(records)
    )])  # fmt: skip


def drift_table(records: list[Record]) -> str:
    head = [*HEAD, "lr", "steps", "seed", "drift", "over the paper's radius", "tiles that changed",
            "95%", "by linear layer", "predicted", "by linear layer", "if gradients agreed",
            "held-out KL"]  # fmt: skip

    def span(values: list[float]) -> str:
        return f"{min(values):.3f} to {max(values):.3f}" if values else ""

    return lines([head, *(
        [*name_of(m.setting), f"{m.lr:g}", m.setting.steps, m.seed, f"{m.drift:.5f}",
         f"{m.drift / m.paper:.3g}", f"{m.changed:.4f}",
         "{:.4f} to {:.4f}".format(*wilson(m.changed, m.tiles)) if m.tiles else "",
         span([changed for _, changed, _ in m.layers.values()]), f"{m.predicted:.4f}",
         span([share for _, _, share in m.layers.values()]), f"{m.agreeing:.4f}",
         f"{m.heldout:.5f}"]
        for m in moved(records)
    )])  # fmt: skip


TABLES = {"pairs": pairs_table, "drift": drift_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["single", *TABLES])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--against", help="of single: an estimator to compare with; or PTQ")
    options = parser.parse_args()
    records = read_records(options.files)
    if options.table == "single":
        print(single_table(records, options.against))
    else:
        print(TABLES[options.table](records))


if __name__ == "__main__":
    main()
