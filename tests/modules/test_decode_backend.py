"""Who multiplies with packed weights, chosen by a tensor that only says where it would be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from softtrellis.modules import decode
from softtrellis.modules.decode import resolve_decode_backend

WARNING = "packed layers decode their weights at every call for float32 activations"


def activations(device: str, dtype: torch.dtype) -> Tensor:
    """Without memory, and without the device."""
    with FakeTensorMode():
        return torch.empty(2, 16, device=device, dtype=dtype)


@pytest.fixture(autouse=True)
def new_process() -> Iterator[None]:
    decode._warn_of_float32.cache_clear()
    yield
    decode._warn_of_float32.cache_clear()


def test_float32_on_a_gpu_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    x = activations("cuda", torch.float32)
    assert x.is_cuda
    assert [resolve_decode_backend("auto", x) for _ in range(3)] == ["torch"] * 3
    assert caplog.text.count(WARNING) == 1
    assert "dtype=torch.bfloat16" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_on_a_gpu_do_not(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    for reason, expected in ((None, "cuda"), ("is another GPU", "triton")):
        monkeypatch.setattr(decode, "_why_no_cuda", lambda _, reason=reason: reason)
        assert resolve_decode_backend("auto", activations("cuda", dtype)) == expected
    assert not caplog.text


def test_nor_does_what_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_decode_backend("torch", activations("cuda", torch.float32)) == "torch"
    assert resolve_decode_backend("auto", activations("cuda", torch.float64)) == "torch"
    for dtype in (torch.float32, torch.bfloat16):
        assert resolve_decode_backend("auto", activations("cpu", dtype)) == "torch"
    assert not caplog.text


def test_a_compiled_graph_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def call(x: Tensor) -> Tensor:
        decode._say_float32_is_slow()
        return x + 1

    for rows in (2, 3):
        assert torch.equal(call(torch.zeros(rows)), torch.ones(rows))
    assert caplog.text.count(WARNING) == 1
