"""The benchmark: its settings, its floors, its rows and its table."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch

from softtrellis.recipes import benchmark as module
from softtrellis.recipes.benchmark import (
    DEFAULT_CASES,
    BenchmarkConfig,
    Case,
    benchmark,
    choose_cases,
)
from softtrellis.recipes.benchmark_results import floor_seconds, table
from softtrellis.recipes.parity import Parity, Referee
from softtrellis.recipes.timing import Rates
from softtrellis.spec import TrellisSpec

CASE = Case("gaussian", TrellisSpec(6, 2, 1))
RATES = Rates(exponentials=1e9, additions=2e9)


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_rates", lambda device: RATES)


def small(**settings: Any) -> BenchmarkConfig:
    chosen = {"cases": (CASE,), "device": "cpu", "tiles": (3,), "seconds": 1e-3, "seed": 5}
    return BenchmarkConfig(**{**chosen, "repeats": 3, **settings})


def test_one_row_for_everything_asked_for() -> None:
    results = benchmark(small(tiles=(2, 3), temperatures=(0.3, 0.05)))
    assert [(row.operation, row.temperature, row.tiles) for row in results.rows] == [
        *(("forward", T, tiles) for T in (0.3, 0.05) for tiles in (2, 3)),
        *(("forward-backward", T, tiles) for T in (0.3, 0.05) for tiles in (2, 3)),
        *(("viterbi", None, tiles) for tiles in (2, 3)),
    ]
    assert results.right
    for row in results.rows:
        assert row.repeats == 3
        assert row.ends == ("tail_biting" if row.operation == "viterbi" else "free")
        assert row.p20_us is not None
        assert row.median_us is not None
        assert row.p80_us is not None
        assert row.floor_us is not None
        assert row.share is not None
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.share == pytest.approx(row.floor_us / row.median_us)
        assert row.peak_bytes is None
    assert results.environment["seed"] == 5
    assert results.environment["backend"] == "cpu"
    assert json.loads(json.dumps(asdict(results), allow_nan=False)) == asdict(results)


@pytest.mark.parametrize("ends", ["free", "pinned"])
def test_ends(ends: str) -> None:
    rows = benchmark(small(ends=ends, temperatures=(0.3,), backend="torch")).rows
    assert {row.ends for row in rows} == {ends}
    assert [row.wrong for row in rows] == [None] * 3


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def soft(*_: Any, **__: Any) -> Parity:
        return Parity({"values": 3.1e-4, "log_z": float("inf")}, "values 3.1e-4 > 2e-5")

    timed: list[str] = []
    whole = module._call

    def call(config: Any, job: Any, referee: Any) -> Any:
        timed.append(job.operation)
        return whole(config, job, referee)

    monkeypatch.setattr(Referee, "soft", soft)
    monkeypatch.setattr(module, "_call", call)
    results = benchmark(small(temperatures=(0.3,)))
    assert timed == ["viterbi"]
    assert not results.right
    wrong = results.rows[0]
    assert (wrong.median_us, wrong.share, wrong.repeats) == (None, None, 0)
    assert wrong.errors == {"values": 3.1e-4, "log_z": None}
    lines = table(results).splitlines()[-3:]
    assert all(line.endswith("wrong: values 3.1e-4 > 2e-5") for line in lines[:2])
    assert json.dumps(asdict(results), allow_nan=False)


def test_without_rates_there_is_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_rates", lambda device: None)
    results = benchmark(small(operations=("viterbi",)))
    assert (results.rows[0].floor_us, results.rows[0].share) == (None, None)
    assert results.environment["exponentials_per_second"] is None
    assert table(results).splitlines()[-1].split()[-4:-1] == ["-", "-", "-"]


def test_the_same_seed_gives_the_same_errors() -> None:
    config = small(operations=("forward",), temperatures=(0.3,))
    first, second = (benchmark(config).rows[0].errors for _ in range(2))
    assert first == second
    fresh = small(operations=("forward",), temperatures=(0.3,), seed=None)
    results = [benchmark(fresh) for _ in range(2)]
    assert results[0].environment["seed"] != results[1].environment["seed"]


def test_floors() -> None:
    spec, states = TrellisSpec(16, 2, 2), 128 * 65536
    assert floor_seconds(spec, "forward", "free", RATES) == pytest.approx(2 * states / 1e9)
    assert floor_seconds(spec, "forward-backward", "pinned", RATES) == 4 * states / 1e9
    assert floor_seconds(spec, "viterbi", "tail_biting", RATES) == 2 * states / 2e9
    assert floor_seconds(spec, "viterbi", "free", RATES) == states / 2e9


def test_cases() -> None:
    assert choose_cases() == DEFAULT_CASES
    assert choose_cases(L=12) == (Case("hyb", TrellisSpec(12, 2, 2)),)
    assert choose_cases(V=1, k=3) == (Case("mul1", TrellisSpec(16, 3, 1)),)
    assert choose_cases("gaussian", L=8) == (Case("gaussian", TrellisSpec(8, 2, 2)),)
    assert choose_cases("1mad") == (Case("1mad", TrellisSpec(16, 2, 1)),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device must be one of cpu, cuda, got 'tpu'"),
        ({"backend": "metal"}, "backend must be one of auto, torch, cpu, "),
        ({"backend": "triton"}, "on a CUDA device"),
        ({"operations": ("sideways",)}, "operation must be one of forward, "),
        ({"operations": ()}, "operation must be given"),
        ({"ends": "loose"}, "ends must be one of auto, free, pinned, tail_biting"),
        ({"ends": "tail_biting"}, "unless the only operation is viterbi"),
        ({"temperatures": (0.001,)}, r"temperature must be from 0.005 to 1e\+06, got 0.001"),
        ({"temperatures": (float("nan"),)}, "temperature must be from"),
        ({"tiles": (4, 0)}, "tiles must be at least 1, got 0"),
        ({"repeats": 2}, "repeats must be at least 3, got 2"),
        ({"seconds": float("inf")}, "seconds must be a positive number, got inf"),
        ({"parity_tiles": 1}, "parity_tiles must be at least 2, got 1"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device must be cpu: torch finds no CUDA device here"):
        small(device="cuda")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    case = Case("hyb", TrellisSpec(12, 2, 2))
    results = benchmark(small(cases=(case,), device="cuda", tiles=(300,)))
    assert [row.wrong for row in results.rows] == [None] * len(results.rows)
    assert all(row.peak_bytes is not None for row in results.rows)
