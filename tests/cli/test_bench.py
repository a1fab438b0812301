"""The command bench: its table, its JSON, its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli.support import Command, Refused

from softtrellis.recipes import parity
from softtrellis.trellis.bcjr import SoftPath, bcjr

SMALL = ["bench", "--device", "cpu", "--code", "gaussian", "--L", "6", "--V", "1"]
SMALL += ["--seconds", "0.001", "--repeats", "3"]


def cells(row: dict[str, Any]) -> list[str]:
    """What the table must say of a row of the JSON."""

    def number(x: float | None, form: str) -> str:
        return "-" if x is None else format(x, form)

    times = (row["median_us"], row["p20_us"], row["p80_us"], row["floor_us"])
    return [
        *(row["code"], f"L{row['L']}", f"k{row['k']}", f"V{row['V']}"),
        *(row["operation"], row["ends"], number(row["temperature"], "g"), str(row["tiles"])),
        *(number(time, ".2f") for time in times),
        number(row["share"], ".0%"),
        "-",
    ]


def test_table_and_json_agree(softtrellis: Command, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    result = softtrellis(*SMALL, "--tiles", "2,3", "--temperature", "0.3,0.03", "--json", file)
    assert result.code == 0, result.err
    found = json.loads(file.read_text(encoding="utf-8"))
    header, _, body = result.out.partition("\n\n")
    facts = dict(line.split(maxsplit=1) for line in header.splitlines())
    assert facts.keys() == found["environment"].keys()
    assert {"date", "device", "processors", "torch", "triton", "numba", "cuda"} <= facts.keys()
    for name, value in found["environment"].items():
        assert facts[name] == (f"{value:.3g}" if isinstance(value, float) else str(value))
    headings, rule, *lines = body.splitlines()
    assert headings.split()[:6] == ["case", "operation", "ends", "T", "tiles", "us/tile"]
    assert set(rule) == {"-", " "}
    assert len(lines) == len(found["rows"]) == 2 * (2 + 2 + 1)
    for line, row in zip(lines, found["rows"], strict=True):
        *told, error = line.split()
        assert told == cells(row)
        assert float(error) == pytest.approx(max(row["errors"].values()), rel=0.05)
        assert row["wrong"] is None
    assert "%|" not in result.out


def test_json_on_standard_output(softtrellis: Command) -> None:
    result = softtrellis(*SMALL, "--operation", "viterbi", "--ends", "free", "--json", "-")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    (row,) = found["rows"]
    assert (row["operation"], row["ends"], row["tiles"]) == ("viterbi", "free", 32)


def test_a_wrong_kernel_is_refused(
    softtrellis: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any, **options: Any) -> SoftPath:
        soft = bcjr(*arguments, **options)
        if options["backend"] == "torch" or options["temperature"] != 0.05:
            return soft
        return SoftPath(soft.values * 1.01, soft.log_z)

    monkeypatch.setattr(parity, "bcjr", wrong)
    options = ["--operation", "forward", "--tiles", "4", "--json", tmp_path / "bench.json"]
    result = softtrellis(*SMALL, *options)
    assert result.code == 1
    before, line, after = result.out.splitlines()[-3:]
    assert "wrong: values 1e-2 > 2e-5" in line
    assert line.partition("wrong")[0].split()[-6:] == ["-"] * 6
    assert "wrong" not in before + after
    rows = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert [row["wrong"] for row in rows] == [None, "values 1e-2 > 2e-5", None]
    assert [row["median_us"] is None for row in rows] == [False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device tpu", "--device: invalid choice: 'tpu'"),
        ("--backend metal", "--backend must be one of auto, torch, cpu, "),
        ("--backend triton", "backend 'triton' takes float32 tensors on a CUDA device"),
        ("--tiles 0", "--tiles must be at least 1, got 0"),
        ("--tiles many", "--tiles: invalid integers value: 'many'"),
        ("--temperature 0.3,cold", "--temperature: invalid numbers value: '0.3,cold'"),
        ("--temperature 0", "--temperature must be from 0.005 to 1e+06, got 0.0"),
        ("--operation sideways", "--operation: invalid choice: 'sideways'"),
        ("--ends tail_biting", "--ends must be free or pinned, unless the only operation is"),
        ("--repeats 1", "--repeats must be at least 3, got 1"),
        ("--seconds 0", "--seconds must be a positive number, got 0.0"),
        ("--parity-tiles 1", "--parity-tiles must be at least 2, got 1"),
        ("--seed -1", "--seed must be from 0"),
        ("--L 3", "--L must be from 4 to 16, got 3"),
        ("--k 5", "k must be from 1 to 4 bits per weight, got 5"),
        ("--code zip", "unknown code 'zip'"),
        ("--code hyb --V 1", "code 'hyb' emits two weights per step (V=2)"),
        ("--json nowhere/bench.json", "--json must be a file in a directory that exists"),
    ],
)
def test_options_that_make_no_sense(refused: Refused, options: str, message: str) -> None:
    assert message in refused("bench", "--device", "cpu", *options.split(), code=2)
