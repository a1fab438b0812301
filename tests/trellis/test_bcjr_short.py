"""BCJR's CUDA kernels for HYB at L = 12 in a build on the host, against the float64 reference."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from cuda_on_host import Library, relative
from torch import Tensor

from softtrellis.codes.codebook import codebook
from softtrellis.trellis import bcjr_cuda, bcjr_torch
from softtrellis.trellis.bcjr_cuda import SHORT_SPEC
from softtrellis.trellis.launch_cuda import address, packed
from softtrellis.trellis.viterbi import viterbi

pytestmark = pytest.mark.usefixtures("one_thread")

KERNELS = ("forward", "backward")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("host"), "bcjr_short.cu", KERNELS)


@dataclass
class OnHost:
    """Stands in for ``Kernel``; threads run one after the other, in this order or the other."""

    library: Library
    name: str
    threads: int
    backwards: bool

    def __call__(
        self,
        blocks: int,
        shared: int,
        device: object,
        addresses: Sequence[Tensor | None],
        numbers: Sequence[int],
    ) -> None:
        scratch = addresses[-4]
        assert scratch is not None
        scratch.fill_(float("nan"))
        pointers = struct.pack(f"{len(addresses)}Q", *map(address, addresses))
        sizes = blocks, self.threads, shared
        self.library.launch(self.name, pointers + packed(numbers), *sizes, backwards=self.backwards)


@pytest.mark.parametrize(
    ("code", "ends"),
    [("hyb", "free"), ("hyb", "pinned"), ("hyb-first", "pinned"), ("gaussian", "free")],
)
def test_kernels_on_the_host(
    library: Library, monkeypatch: pytest.MonkeyPatch, code: str, ends: str
) -> None:
    """What is certified is right; what is left are low temperatures, and other codebooks."""
    kernels = [OnHost(library, name, 256, ends == "pinned") for name in KERNELS]
    monkeypatch.setattr(bcjr_cuda, "_SHORT", kernels)
    monkeypatch.setattr(bcjr_cuda, "multiprocessors", lambda _: 2)
    temperatures = [100.0, 0.3, 0.1, 0.05, 0.03, 0.002]
    T = torch.tensor(temperatures).repeat_interleave(3)
    generator = torch.Generator().manual_seed(3)
    C = codebook(code.partition("-")[0], SHORT_SPEC, seed=0)
    if code == "hyb-first":
        C = C.flip(1).contiguous()
    w = torch.randn(len(T), 24, 2, generator=generator)
    w[::3, 5] *= 3
    g, gz = torch.randn(w.shape, generator=generator), torch.randn(len(T), generator=generator)
    pins = torch.randint(256, (len(T),), generator=generator) if ends == "pinned" else None

    exact = (w.double(), C.double(), SHORT_SPEC, T.double(), pins)
    values_, log_z_, _ = bcjr_torch.soft_forward(*exact, False)
    grad_w_, _ = bcjr_torch.soft_backward(*exact, values_, g.double(), gz.double(), False)
    passed_, _ = bcjr_torch.soft_backward(*exact, values_, g.double(), None, False)
    ends_ = "free" if pins is None else pins
    hard = viterbi(w, C, SHORT_SPEC, ends=ends_).values
    values, log_z, grad_w = torch.empty_like(w), torch.empty(len(T)), torch.empty_like(w)
    passed = torch.empty_like(w)
    problem = (w, C, SHORT_SPEC, T, pins)
    forward = [(values, values_), (log_z, log_z_)]
    upstream = [values_.float(), None, g, gz, grad_w]
    for outputs, pairs in (
        ([values, log_z, None, None, None], forward),
        (upstream, [(grad_w, grad_w_)]),
        ([hard, None, g, None, passed], [(passed, passed_)]),
    ):
        failed, failures = bcjr_cuda._start(*problem, outputs)
        if code == "gaussian":
            assert int(failures) == len(T)
            continue
        left = failed[: int(failures)].tolist()
        assert len(set(left)) == len(left)
        assert {15, 16, 17} <= set(left)
        outliers = range(0, len(T), 3)
        assert all(float(T[i]) < 0.05 or i in outliers for i in left)
        for temperature in temperatures[:-1]:
            mine = [i for i in range(len(T)) if T[i] == T.new_tensor(temperature) and i not in left]
            for found, best in pairs:
                assert relative(found[mine], best[mine]) < 2e-5, temperature
