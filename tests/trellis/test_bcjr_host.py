"""BCJR's CUDA kernels in a build on the host, against the float64 reference."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from cuda_on_host import Library
from torch import Tensor

from softtrellis.codes.codebook import codebook
from softtrellis.spec import TrellisSpec
from softtrellis.trellis import bcjr_cuda, bcjr_torch
from softtrellis.trellis.bcjr_cuda import HYB_SPEC, SCALAR_SPEC, SHORT_SPEC
from softtrellis.trellis.launch_cuda import address, packed
from softtrellis.trellis.viterbi import viterbi

pytestmark = pytest.mark.usefixtures("one_thread")

KERNELS = ("forward", "backward")
THREADS = {HYB_SPEC: 512, SCALAR_SPEC: 512, SHORT_SPEC: 256}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[TrellisSpec, Library]:
    sources = {HYB_SPEC: "bcjr_hyb.cu", SCALAR_SPEC: "bcjr_scalar.cu", SHORT_SPEC: "bcjr_short.cu"}
    return {
        spec: Library(tmp_path_factory.mktemp("host"), source, KERNELS)
        for spec, source in sources.items()
    }


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
        parameter, table = pointers + packed(numbers), addresses[1]
        assert table is not None
        sizes, constants = (blocks, self.threads, shared), [(address(table), table.nbytes)]
        backwards = self.backwards
        self.library.launch(self.name, parameter, *sizes, backwards=backwards, constants=constants)


@pytest.mark.parametrize(
    ("spec", "code", "ends"),
    [
        (SHORT_SPEC, "hyb", "free"),
        (SHORT_SPEC, "hyb", "pinned"),
        (SHORT_SPEC, "hyb-first", "pinned"),
        (SHORT_SPEC, "gaussian", "free"),
        (HYB_SPEC, "hyb", "free"),
        (HYB_SPEC, "hyb-first", "pinned"),
        (HYB_SPEC, "gaussian", "free"),
        (SCALAR_SPEC, "mul1", "free"),
        (SCALAR_SPEC, "3inst", "pinned"),
        (SCALAR_SPEC, "gaussian", "free"),
    ],
)
def test_kernels_on_the_host(
    libraries: dict[TrellisSpec, Library],
    monkeypatch: pytest.MonkeyPatch,
    spec: TrellisSpec,
    code: str,
    ends: str,
) -> None:
    """What is certified is right; what is left are low temperatures, and other codebooks."""
    kernels = [OnHost(libraries[spec], name, THREADS[spec], ends == "pinned") for name in KERNELS]
    for own in ("_HYB", "_SCALAR", "_SHORT"):
        monkeypatch.setattr(bcjr_cuda, own, kernels)
    monkeypatch.setattr(bcjr_cuda, "multiprocessors", lambda _: 2)
    temperatures = [100.0, 0.3, 0.1, 0.05, 0.03, 0.002]
    each, steps = (3, 24) if spec == SHORT_SPEC else (1, 10)
    T = torch.tensor(temperatures).repeat_interleave(each)
    generator = torch.Generator().manual_seed(3)
    C = codebook(code.partition("-")[0], spec, seed=0)
    if code == "hyb-first":
        C = C.flip(1).contiguous()
    w = torch.randn(len(T), steps, spec.V, generator=generator)
    outliers = range(0, len(T), 3)
    w[outliers, 5] *= 3
    g, gz = torch.randn(w.shape, generator=generator), torch.randn(len(T), generator=generator)
    pins = None
    if ends == "pinned":
        pins = torch.randint(spec.num_overlaps, (len(T),), generator=generator)

    exact = (w.double(), C.double(), spec, T.double(), pins)
    values_, log_z_, _ = bcjr_torch.soft_forward(*exact, False)
    grad_w_, _ = bcjr_torch.soft_backward(*exact, values_, g.double(), gz.double(), False)
    passed_, _ = bcjr_torch.soft_backward(*exact, values_, g.double(), None, False)
    hard = viterbi(w, C, spec, ends="free" if pins is None else pins).values
    values, log_z, grad_w = torch.empty_like(w), torch.empty(len(T)), torch.empty_like(w)
    passed = torch.empty_like(w)
    problem = (w, C, spec, T, pins)
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
        assert spec != SHORT_SPEC or {15, 16, 17} <= set(left)
        assert all(float(T[i]) < 0.05 or i in outliers for i in left)
        for temperature in temperatures[:-1]:
            mine = [i for i in range(len(T)) if T[i] == T.new_tensor(temperature) and i not in left]
            for found, best in pairs:  # which may be 1e-11 where one path has it all
                assert bool(torch.isfinite(found[mine]).all())
                error = (found[mine] - best[mine]).norm()
                least = 0.0 if spec == SHORT_SPEC else 1e-9
                assert float(error) <= 2e-5 * float(best[mine].norm()) + least, temperature
            assert mine or temperature not in (0.3, 0.1)
        assert len(left) <= len(T) // 2
