"""Runs that were made before are not made again: python benchmarks/known.py FOLDER FILE ...

FOLDER is that of the scripts that share runs (``runs.sh``), FILEs are JSON lines of
``experiment.py`` and ``claims.py``, packed by xz or not. Seeds after the first find there which
rate was best.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiment import path_of
from results_tables import read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    claims = options.folder / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    records = read_records(options.files)
    with (options.folder / "known.jsonl").open("w", encoding="utf-8") as file:
        for record in records:
            path_of(claims, record["name"], record["seed"]).touch()
            file.write(json.dumps(record) + "\n")
    print(f"{len(records)} runs")


if __name__ == "__main__":
    main()
