"""Faults that really happen: killed processes, and the same bytes with and without them.

``scripts/faults.py`` kills many more; docs/reliability.md has its counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_killed_runs_end_with_the_same_bytes() -> None:
    """One kill of each kind for each command; both commands give the same bytes twice, too."""
    command = [sys.executable, ROOT / "scripts" / "faults.py", "--seed", "7"]
    command += ["--random", "2", "--operation", "2", "--write", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout).items():
        assert found["killed"] >= 2, name
        assert found["two undisturbed runs are the same"], name
        ends = "resumed to the same bytes", "ended with the same bytes", "killed when all was done"
        assert sum(found.get(end, 0) for end in ends) == 3, name
