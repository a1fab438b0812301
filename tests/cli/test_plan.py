"""softtrellis plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.support import LAYERS, Command, Refused


def test_the_table(softtrellis: Command, checkpoint: Path, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan = ["plan", checkpoint, "--lr", "0.01", "--teacher", model]
    result = softtrellis(*plan, "--json", file)
    assert (result.code, result.err) == (0, "")
    assert "lr 0.01, 240 steps, warm-up 5, cosine" in result.out
    assert "0.09974" in result.out
    assert "towards the teacher" in result.out
    start, verdict = result.out.splitlines()[-2:]
    assert start.startswith("Predicted for train --start 0, from the codewords; ")
    assert "Codes " in verdict
    record = json.loads(file.read_text(encoding="utf-8"))
    assert list(record["layers"]) == LAYERS
    assert {len(tiles) for radii in record["layers"].values() for tiles in radii.values()} == {8}
    assert softtrellis(*plan).out == result.out


def test_the_learning_rate_of_a_walk(softtrellis: Command, checkpoint: Path) -> None:
    result = softtrellis("plan", checkpoint, "--steps", "400", "--tiles", "3")
    assert "weights travel 0.14 sigma (RMS) if gradients\nhave random signs" in result.out


def test_a_run_that_cannot_change_codes(softtrellis: Command, checkpoint: Path) -> None:
    run = ["--lr", "1e-5", "--steps", "20", "--schedule", "constant"]
    sample = ["--layers", "1.self_attn.k_proj", "--tiles", "3", "--seed", "4"]
    result = softtrellis("plan", checkpoint, *run, *sample)
    assert result.code == 0
    assert "20 steps, warm-up 5, constant" in result.out
    assert "3 tiles of 1 layers" in result.out
    assert result.out.splitlines()[-1].startswith("This run cannot change a code: AdamW moves")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "0"], "--lr must be a positive number"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--tiles", "0"], "--tiles must be at least 1, got 0"),
        (["--layers", "7"], "no linear layer matches '7'"),
        (["--json", "no/such/file"], "--json must be a file"),
    ],
)
def test_options_that_make_no_sense(
    refused: Refused, checkpoint: Path, options: list[str], message: str
) -> None:
    assert message in refused("plan", checkpoint, *options, code=2)


def test_inputs_that_do_not_fit(refused: Refused, checkpoint: Path, model: Path) -> None:
    assert "mlp.down_proj" in refused("plan", checkpoint, "--layers", "1.mlp.down_proj", code=1)
    assert "not a softtrellis checkpoint" in refused("plan", model, code=1)
    message = refused("plan", checkpoint, "--teacher", checkpoint, code=1)
    assert "give the full-precision model" in message
