"""Codewords that several ranks share, gathered one decoder layer at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharded_worker
from sharded_worker import RUNS


def torchrun(folder: Path, ranks: int, jobs: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(ranks), sharded_worker.__file__, str(folder), *jobs]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert done.returncode == 0, "\n".join(told[-60:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two and three ranks found."""
    folder = tmp_path_factory.mktemp("sharded")
    torchrun(folder, 2, ["gradients", "bfloat16", "memory", *RUNS])
    torchrun(folder, 3, ["gradients"])
    return folder


def found(folder: Path, job: str, ranks: int = 2) -> list[dict[str, Any]]:
    of_every_rank: list[dict[str, Any]] = json.loads((folder / f"{job}-{ranks}.json").read_text())
    assert len(of_every_rank) == ranks
    return of_every_rank


@pytest.mark.parametrize(("job", "ranks"), [("gradients", 2), ("gradients", 3), ("bfloat16", 2)])
def test_gradients_are_the_sums_of_all_ranks(folder: Path, job: str, ranks: int) -> None:
    """With layers that only some ranks call, or none; five tiles are no multiple of the ranks."""
    for same in found(folder, job, ranks):
        assert len(same) == 32
        assert [name for name, close in same.items() if not close] == []


def test_no_weight_stays_whole(folder: Path) -> None:
    """A further decoder layer adds what this rank owns, 16 bytes over 2 ranks, and activations.

    Tiles and codewords that BCJR's backward pass keeps, the codewords that passes take and their
    gradient are 4 bytes each. One whole float32 tensor more would be 4 bytes beyond.
    """
    for rank in found(folder, "memory"):
        assert rank["held"] == pytest.approx(12 / 2, abs=0.1)
        assert rank["peak"] == pytest.approx(16 / 2, abs=0.5)


@pytest.mark.parametrize("run", RUNS)
def test_runs_are_those_of_one_process(folder: Path, run: str) -> None:
    for rank in found(folder, run):
        assert len(rank["one"]) == len(rank["several"])
        for one, several in zip(rank["one"], rank["several"], strict=True):
            assert one.keys() == several.keys()
            for key in one.keys() & {"loss", "grad_norm", "heldout_kl", "heldout_kl_hard"}:
                assert several[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7), key
        assert rank["logits"] < 1e-4
