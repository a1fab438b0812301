"""Tables of docs/results.md from the JSON lines of the experiments.

    python benchmarks/results_tables.py docs/results/*-claims.jsonl.xz [--prefix single/4]
        [--against NAME] [--union pairs/ --parts soft]

Per run: steps, seconds, perplexity, KL to the teacher, and with --against the paired difference of
both from that run, with 95% intervals (10,000 resamples of windows; seeds of a run are averaged
window by window). --union adds, for every set of layers, how much more training gained there than
on its layers one by one.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softtrellis.evaluation.divergence import Interval, paired_bootstrap

Runs = dict[str, list[dict[str, Any]]]


def lines(path: Path) -> list[str]:
    """Of a file that may be compressed (.xz)."""
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8").splitlines()


def read(paths: list[Path], prefix: str) -> Runs:
    """Scored runs by name, one record per seed."""
    runs: Runs = defaultdict(list)
    for path in paths:
        for line in lines(path):
            record = json.loads(line)
            if "windows" in record and record["name"].startswith(prefix):
                runs[record["name"]].append(record)
    return runs


def per_token(records: list[dict[str, Any]], metric: str) -> tuple[Tensor, Tensor]:
    """Scores per token [windows], averaged over seeds, and the tokens of each window."""
    tokens = torch.tensor(records[0]["windows"]["tokens"], dtype=torch.float64)
    scores = torch.tensor([r["windows"][metric] for r in records], dtype=torch.float64)
    return scores.mean(0) / tokens, tokens


def difference(a: list[dict[str, Any]], b: list[dict[str, Any]], metric: str) -> Interval:
    """Of two runs, a - b in nats per token."""
    (x, tokens), (y, _) = per_token(a, metric), per_token(b, metric)
    return paired_bootstrap(x, y, tokens)


def words(interval: Interval) -> str:
    """As in the tables."""
    return f"{interval.mean:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"


def spread(values: list[float], digits: int) -> str:
    """The mean, with the standard deviation of several seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(runs: Runs, against: str | None) -> str:
    """One row per run."""
    head = ["run", "seeds", "steps", "seconds", "perplexity", "KL"]
    if against:
        head += [f"KL minus {against}", "log loss minus the same"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, records in runs.items():
        steps = {len(record.get("log", ())) for record in records}
        row = [
            name,
            str(len(records)),
            "-".join(map(str, sorted({min(steps), max(steps)}))),
            f"{statistics.mean(record['seconds'] for record in records):.0f}",
            spread([record["perplexity"] for record in records], 2),
            spread([record["kl"] for record in records], 4),
        ]
        if against:
            for metric in ("kl", "nll"):
                found = difference(records, runs[against], metric)
                row.append("" if name == against else words(found))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def unions(runs: Runs, prefix: str, parts: str) -> str:
    """Gains of sets of layers against the sum of their layers' gains, in nats of log loss."""
    gains: dict[str, Tensor] = {}
    tokens = torch.empty(0)
    for name, records in runs.items():
        if name.startswith(prefix) and f"{name}/{parts}" in runs:
            before, tokens = per_token(records, "nll")
            after, _ = per_token(runs[f"{name}/{parts}"], "nll")
            gains[name.removeprefix(prefix)] = before - after
    lines = ["| layers | gain | sum of single gains | more than the sum |", "|---|---|---|---|"]
    for layers, gain in gains.items():
        members = layers.split(",")
        if len(members) > 1 and all(member in gains for member in members):
            total = torch.stack([gains[member] for member in members]).sum(0)
            more = paired_bootstrap(gain, total, tokens)
            mean = [float((x * tokens).sum() / tokens.sum()) for x in (gain, total)]
            lines.append(f"| {layers} | {mean[0]:.4f} | {mean[1]:.4f} | {words(more)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--prefix", default="")
    parser.add_argument("--against")
    parser.add_argument("--union", metavar="PREFIX")
    parser.add_argument("--parts", default="soft")
    options = parser.parse_args()
    runs = read(options.files, options.prefix)
    print(table(runs, options.against))
    if options.union is not None:
        print()
        print(unions(runs, options.union, options.parts))
    best = min(runs, key=lambda name: statistics.mean(r["kl"] for r in runs[name]), default="")
    if best and not math.isnan(runs[best][0]["kl"]):
        print(f"\nleast KL: {best}")


if __name__ == "__main__":
    main()
