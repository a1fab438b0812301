"""docs/results.md against the runs that it is made of."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from results_tables import difference, read  # noqa: E402

DATA, PAGE = ROOT / "docs" / "results", (ROOT / "docs" / "results.md").read_text("utf-8")


def test_the_table_of_equal_tokens() -> None:
    runs = read([DATA / "a5ef0bd-models.jsonl.xz"], "tokens/")
    first, soft = runs["tokens/identity-1.5e-2-start-0.5"], runs["tokens/soft-1.5e-2-start-0.5"]
    identity = [*first, *runs["tokens/identity"]]
    assert sorted(run["seed"] for run in identity) == [0, 1, 2]
    for key, digits in (("perplexity", 2), ("kl", 4)):
        found = [run[key] for run in identity]
        mean, spread = statistics.mean(found), statistics.stdev(found)
        assert f"**{mean:.{digits}f} ± {spread:.{digits}f}**" in PAGE
    ahead = difference(soft, first, "kl")
    assert f"+{ahead.mean:.3f} (+{ahead.low:.3f} to +{ahead.high:.3f}), the same seed" in PAGE
    then_soft = read([DATA / "3815181-models.jsonl.xz"], "")["tokens/then-soft-0.2"]
    gain = difference(then_soft, first, "kl")
    assert f"({gain.mean:.4f},\n{gain.low:.4f} to {gain.high:.4f})" in PAGE


def test_every_run_is_scored_on_whole_texts() -> None:
    for path in sorted(DATA.iterdir()):
        runs = [run for seeds in read([path], "").values() for run in seeds]
        assert runs, path
        for run in runs:
            (windows,) = {len(scores) for scores in run["windows"].values()}
            assert windows in (148, 16), run["name"]  # 16 in the third search
