"""Tables of whole models of docs/results.md from the JSON lines of the experiments.

    python benchmarks/results_tables.py docs/results/b560f7f-models.jsonl.xz --prefix tokens/
    python benchmarks/results_tables.py docs/results/{a5ef0bd,b560f7f}-models.jsonl.xz --rows \
        "identity=tokens/identity-1.5e-2-start-0.5+tokens/identity" \
        "soft=tokens/soft-7.5e-3-start-0.5" --against identity

Per run: steps, seconds, perplexity, KL to the teacher, and with --against the paired difference of
both from that run, of the seeds that both have, with 95% intervals: over windows of the test text
(10,000 resamples, seeds averaged window by window) and, of several seeds, over these (t, paired by
seed). --rows names the rows, in their order; what one setting's seeds are called in several files
is joined by "+". Of a run that was made again, --latest takes the one of the last file.
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

Record = dict[str, Any]
Runs = dict[str, list[Record]]

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom."""


def lines(path: Path) -> list[str]:
    """Of a file that may be compressed (.xz)."""
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8").splitlines()


def read_records(paths: list[Path]) -> list[Record]:
    """All records, each with the commit that its file is named by."""
    return [
        json.loads(line) | {"commit": path.name.partition("-")[0]}
        for path in paths
        for line in lines(path)
    ]


def read(paths: list[Path], prefix: str) -> Runs:
    """Scored runs by name, one record per seed."""
    runs: Runs = defaultdict(list)
    for record in read_records(paths):
        if "windows" in record and record["name"].startswith(prefix):
            runs[record["name"]].append(record)
    return runs


def rows(runs: Runs, texts: list[str]) -> Runs:
    """Of "LABEL=NAME+NAME" or "NAME+NAME": the runs of these names by label.

    Raises:
        ValueError: a name without runs.
    """
    chosen: Runs = {}
    for text in texts:
        label, _, names = text.rpartition("=")
        for name in names.split("+"):
            if name not in runs:
                raise ValueError(f"no run is called {name!r}; there are {', '.join(runs)}")
            chosen.setdefault(label or names, []).extend(runs[name])
    return chosen


def check_seeds(runs: Runs) -> None:
    """ValueError where one seed has two runs of a name, in two files say."""
    for name, records in runs.items():
        seeds = [record["seed"] for record in records]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{name} has a seed twice, {seeds}: name fewer files, or --latest")


def latest(runs: Runs) -> Runs:
    """Of runs of one name and seed the last one."""
    return {name: list({r["seed"]: r for r in records}.values()) for name, records in runs.items()}


def per_token(records: list[dict[str, Any]], metric: str) -> tuple[Tensor, Tensor]:
    """Scores per token [windows], averaged over seeds, and the tokens of each window."""
    tokens = torch.tensor(records[0]["windows"]["tokens"], dtype=torch.float64)
    scores = torch.tensor([r["windows"][metric] for r in records], dtype=torch.float64)
    return scores.mean(0) / tokens, tokens


def over_tokens(scores: Tensor, tokens: Tensor) -> Tensor:
    """[...], the mean per token of scores per token [..., windows]."""
    return (scores * tokens).sum(-1) / tokens.sum()


def difference(a: list[dict[str, Any]], b: list[dict[str, Any]], metric: str) -> Interval:
    """Of two runs, a - b in nats per token."""
    (x, tokens), (y, _) = per_token(a, metric), per_token(b, metric)
    return paired_bootstrap(x, y, tokens)


def same_seeds(a: list[Record], b: list[Record]) -> tuple[list[Record], list[Record]]:
    """The runs of the seeds that both have, in the same order."""
    first, second = ({record["seed"]: record for record in runs} for runs in (a, b))
    common = sorted(first.keys() & second.keys())
    return [first[seed] for seed in common], [second[seed] for seed in common]


def by_seed(a: list[Record], b: list[Record], metric: str) -> dict[int, float]:
    """a - b in nats per token, of every seed that both have."""
    found = {}
    for one, other in zip(*same_seeds(a, b), strict=True):
        (x, tokens), (y, _) = per_token([one], metric), per_token([other], metric)
        found[one["seed"]] = float(over_tokens(x - y, tokens))
    return found


def over_seeds(differences: dict[int, float]) -> Interval:
    """Their mean with the 95% interval of Student's t; of two seeds at least."""
    values = list(differences.values())
    half = T_975[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return Interval(mean, mean - half, mean + half)


def words(interval: Interval) -> str:
    """As in the tables."""
    return f"{interval.mean:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"


def seeds_in_words(differences: dict[int, float]) -> str:
    """Every seed's, and the interval over them."""
    each = ", ".join(f"{seed}: {value:+.4f}" for seed, value in sorted(differences.items()))
    if len(differences) < 2:
        return each
    found = over_seeds(differences)
    return f"{each}; {found.low:+.4f} to {found.high:+.4f}"


def spread(values: list[float], digits: int) -> str:
    """The mean, with the standard deviation of several seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(runs: Runs, against: str | None) -> str:
    """One row per run."""
    head = ["run", "seeds", "steps", "seconds", "perplexity", "KL"]
    if against:
        head += [f"KL minus {against}, windows", "by seed", "log loss minus the same", "by seed"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, records in runs.items():
        steps = {len(record.get("log", ())) for record in records}
        row = [
            name,
            ", ".join(str(record["seed"]) for record in records),
            "-".join(map(str, sorted({min(steps), max(steps)}))),
            f"{statistics.mean(record['seconds'] for record in records):.0f}",
            spread([record["perplexity"] for record in records], 2),
            spread([record["kl"] for record in records], 4),
        ]
        if against:
            pair = same_seeds(records, runs[against])
            for metric in ("kl", "nll"):
                none = name == against or not pair[0]
                row.append("" if none else words(difference(*pair, metric)))
                row.append("" if none else seeds_in_words(by_seed(*pair, metric)))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--prefix", default="", help="of the names of runs")
    parser.add_argument("--rows", nargs="+", metavar="LABEL=NAME+NAME")
    parser.add_argument("--against", metavar="LABEL")
    parser.add_argument("--latest", action="store_true", help="of runs that were made again")
    options = parser.parse_args()
    runs = read(options.files, options.prefix)
    if options.rows:
        runs = rows(runs, options.rows)
    if options.latest:
        runs = latest(runs)
    check_seeds(runs)
    print(table(runs, options.against))


if __name__ == "__main__":
    main()
