"""The nearest other path, against enumeration of all paths."""

from __future__ import annotations

import pytest
import torch
from oracle import admitted, all_paths
from torch import Tensor

from softtrellis.codes.codebook import codebook
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.detours import DetourBackend, nearest_detour

SPECS = [TrellisSpec(4, 1, 2), TrellisSpec(4, 2, 1), TrellisSpec(5, 3, 1), TrellisSpec(6, 2, 2)]
CASES = [("torch", torch.float64), ("torch", torch.float32), ("cpu", torch.float32)]
Case = tuple[DetourBackend, torch.dtype]


def problem(spec: TrellisSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Some paths of one end [B, N], all paths of their ends [P, N], and a codebook."""
    steps = 3 if spec.shift == 4 else 5
    table = codebook("gaussian", spec, seed=3).to(dtype)
    paths = all_paths(spec, steps)
    pairs = (paths[:, 0] >> spec.shift) * spec.num_overlaps + paths[:, -1] % spec.num_overlaps
    same = paths[pairs == pairs[len(paths) // 3]]
    return same[:: max(1, len(same) // 7)], same, table


def differences(one: Tensor, others: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Squared and absolute distances [P - 1] of the other paths."""
    others = others[(others != one).any(1)]
    apart = (table[others] - table[one]).abs()
    return apart.square().sum((1, 2)), apart.sum((1, 2))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("credit", [0.0, 0.2, 1.5])
def test_the_best_of_all_other_paths(spec: TrellisSpec, case: Case, credit: float) -> None:
    backend, dtype = case
    chosen, every, table = problem(spec, dtype)
    found = nearest_detour(
        chosen, table, spec, credit=table.new_full(chosen.shape[:1], credit), backend=backend
    )
    for one, squared, length in zip(chosen, found.squared, found.length, strict=True):
        squares, lengths = differences(one, every, table)
        expected = (squares - 2 * credit * lengths).min()
        torch.testing.assert_close(squared - 2 * credit * length, expected, atol=2e-5, rtol=1e-5)
        near = (squares - squared).abs() + (lengths - length).abs()
        assert near.min() < 1e-4  # both belong to one path


def test_a_path_that_is_alone() -> None:
    spec = TrellisSpec(6, 1, 2)
    path = admitted(all_paths(spec, 2), spec, 5)
    assert len(path) == 1
    for table in (codebook("gaussian", spec), codebook("gaussian", spec).double()):
        assert nearest_detour(path, table, spec).squared.isinf().all()


def test_no_tiles() -> None:
    spec = TrellisSpec(4, 1, 2)
    none = torch.zeros(0, 5, dtype=torch.int32)
    assert nearest_detour(none, codebook("gaussian", spec), spec).squared.shape == (0,)


def test_what_is_refused() -> None:
    spec = TrellisSpec(4, 1, 2)
    table = codebook("gaussian", spec)
    with pytest.raises(ValueError, match="not a path"):
        nearest_detour(torch.tensor([[0, 5, 0]]), table, spec)
    path = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        nearest_detour(path, table, spec, backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float32 tensors on the CPU"):
        nearest_detour(path, table.double(), spec, backend="cpu")
