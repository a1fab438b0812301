"""Memory that runs out: tiles are taken in smaller parts, to the same results, and it is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from softtrellis import TrellisSpec, bcjr, codebook, viterbi
from softtrellis.trellis import bcjr_torch, memory, viterbi_torch

SPEC = TrellisSpec(6, 2, 1)
TILES, STEPS = 13, 8


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BCJR", "BCJR_BACKWARD", "VITERBI"):
        operation = getattr(memory, name)
        monkeypatch.setattr(operation, "most", {})
        monkeypatch.setattr(operation, "halvings", 0)


@pytest.fixture
def device_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """A device that holds so many tiles; the list gets the tiles of every call that it held."""

    def limit(most: int) -> list[int]:
        held: list[int] = []

        def limited(whole: Callable[..., Any]) -> Callable[..., Any]:
            def call(w: torch.Tensor, *others: Any) -> Any:
                if len(w) > most:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                held.append(len(w))
                return whole(w, *others)

            return call

        for module, name in (
            (bcjr_torch, "soft_forward"),
            (bcjr_torch, "soft_backward"),
            (viterbi_torch, "best_path"),
        ):
            monkeypatch.setattr(module, name, limited(getattr(module, name)))
        return held

    return limit


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(TILES, STEPS, 1, generator=generator, dtype=torch.float64)
    pins = torch.randint(SPEC.num_overlaps, (TILES,), generator=generator)
    return w, codebook("gaussian", SPEC).double(), pins


def gradients(ends: Any, temperature: Any) -> list[torch.Tensor]:
    w, table, pins = problem()
    w.requires_grad_(), table.requires_grad_()
    found = bcjr(
        w,
        table,
        SPEC,
        temperature=temperature,
        ends=pins if ends == "pinned" else ends,
        return_entropy=ends != "tail_biting",
        backend="torch",
    )
    (found.values.square().sum() + found.log_z.sum()).backward()
    parts = [found.values, found.log_z, found.entropy, w.grad, table.grad]
    return [part.detach() for part in parts if part is not None]


@pytest.mark.parametrize("ends", ["free", "pinned", "tail_biting"])
@pytest.mark.parametrize("most", [1, 3, 12])
def test_bcjr_in_parts_is_the_same(
    device_of: Callable[[int], list[int]], ends: str, most: int
) -> None:
    temperature = torch.linspace(0.1, 1.0, TILES, dtype=torch.float64)
    expected = gradients(ends, temperature)
    held = device_of(most)
    found = gradients(ends, temperature)
    assert max(held) <= most
    assert memory.halvings() > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ends", ["free", "pinned", "tail_biting", "tail_biting_exact"])
def test_viterbi_in_parts_is_the_same(device_of: Callable[[int], list[int]], ends: str) -> None:
    w, table, pins = problem()

    def states() -> torch.Tensor:
        chosen: Any = pins if ends == "pinned" else ends
        return viterbi(w, table, SPEC, ends=chosen, backend="torch").states

    expected = states()
    held = device_of(4)
    assert torch.equal(states(), expected)
    assert max(held) <= 4


def test_it_is_counted_and_said_once(
    device_of: Callable[[int], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    held = device_of(4)
    w, table, pins = problem()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            bcjr(w, table, SPEC, temperature=0.3, ends=pins, backend="torch")
    assert held == 3 * [3, 3, 3, 3, 1]
    assert memory.halvings() == memory.BCJR.halvings == 2
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: BCJR takes 3 tiles at once from now on"
    ]


def test_one_tile_that_does_not_fit(device_of: Callable[[int], list[int]]) -> None:
    device_of(0)
    w, table, pins = problem()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        bcjr(w, table, SPEC, temperature=0.3, ends=pins, backend="torch")


def test_other_trellises_keep_their_size(device_of: Callable[[int], list[int]]) -> None:
    held = device_of(4)
    w, table, pins = problem()
    bcjr(w, table, SPEC, temperature=0.3, ends=pins, backend="torch")
    held.clear()
    other = TrellisSpec(5, 2, 1)
    bcjr(w[:4], codebook("gaussian", other).double(), other, temperature=0.3, backend="torch")
    assert held == [4]


@pytest.mark.gpu
def test_a_gpu_that_is_almost_full() -> None:
    """With what a batch needs beyond its inputs not free, it is computed in parts."""
    spec = TrellisSpec(16, 2, 2)
    table = codebook("hyb", spec).cuda()
    w = torch.randn(2048, 128, 2, device="cuda")
    pins = torch.zeros(len(w), dtype=torch.int64, device="cuda")
    expected = bcjr(w, table, spec, temperature=0.3, ends=pins, backend="triton").values
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / total)
    try:
        found = bcjr(w, table, spec, temperature=0.3, ends=pins, backend="triton").values
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert memory.halvings() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
