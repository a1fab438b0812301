"""Hessians of experts that saw few tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from softtrellis.recipes.expert_hessians import fill_sparse_hessians

COUNTS = {"a": 3, "b": 40, "c": 57, "d": 0}


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, 6, generator=generator) for name, count in COUNTS.items()}


def moments(x: Tensor) -> Tensor:
    return x.T @ x / x.shape[0]


def test_sparse_members_take_the_moments_of_all_tokens() -> None:
    seen = inputs()
    hessians = {name: moments(x) for name, x in seen.items() if name != "d"}
    before = {name: hessian.clone() for name, hessian in hessians.items()}
    given = dict(hessians)
    filled = fill_sparse_hessians(hessians, COUNTS, {"g": ["a", "b", "c", "d"]}, least=40)
    assert filled == ["a", "d"]
    torch.testing.assert_close(hessians["a"], moments(torch.cat(list(seen.values()))))
    assert hessians["d"] is hessians["a"]
    assert hessians["b"] is given["b"]
    for name, hessian in before.items():
        assert torch.equal(given[name], hessian)


def test_zeros_of_a_member_that_saw_nothing_do_not_count() -> None:
    hessians = {"b": torch.eye(2), "d": torch.full((2, 2), torch.nan)}
    assert fill_sparse_hessians(hessians, COUNTS, {"g": ["b", "d"]}, least=1) == ["d"]
    assert torch.equal(hessians["d"], torch.eye(2))


def test_groups_do_not_mix_and_an_unseen_group_is_left_out() -> None:
    counts = {"a": 5, "b": 0, "c": 0, "dense": 0}
    hessians = {name: torch.eye(2) * i for i, name in enumerate(counts, start=1)}
    groups = {"seen": ["a"], "unseen": ["b", "c"]}
    assert fill_sparse_hessians(hessians, counts, groups, least=5) == ["b", "c"]
    assert list(hessians) == ["a", "dense"]
    assert torch.equal(hessians["a"], torch.eye(2))


def test_nothing_to_fill() -> None:
    hessians = {"b": torch.eye(2), "c": torch.eye(2)}
    assert fill_sparse_hessians(hessians, COUNTS, {"g": ["b", "c"]}, least=40) == []
    assert fill_sparse_hessians(hessians, COUNTS, {}, least=40) == []


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="least must be at least 1"):
        fill_sparse_hessians({}, {}, {}, least=0)
    with pytest.raises(KeyError, match="other"):
        fill_sparse_hessians({}, COUNTS, {"g": ["other"]}, least=1)
    with pytest.raises(KeyError, match="a"):
        fill_sparse_hessians({}, COUNTS, {"g": ["a"]}, least=9)
