"""The CUDA kernels that multiply with packed weights, in a build on the host."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from cuda_on_host import Library, relative
from torch import Tensor

from softtrellis.modules import decode_cuda
from softtrellis.modules.decode import CodeValues, decode_matmul
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TrellisSpec
from softtrellis.transforms.incoherence import Incoherence, pack_signs
from softtrellis.trellis.launch_cuda import TYPES, Kernel, packed

pytestmark = pytest.mark.usefixtures("one_thread", "poison")

PRODUCTS = [variant for variants in decode_cuda.VARIANTS.values() for variant in variants]
KERNELS = [variant.kernel.name for variant in [*PRODUCTS, *decode_cuda.ROTATING.values()]]
HYB = TrellisCode(TrellisSpec(16, 2, 2), "hyb")
SHORT = TrellisCode(TrellisSpec(12, 2, 2), "hyb")
MUL1 = TrellisCode(TrellisSpec(16, 2, 1), "mul1", order="exl3")
CODES = {
    "hyb": HYB,
    "hyb-first": TrellisCode(HYB.spec, "hyb", flip="first"),
    "hyb12": SHORT,
    "hyb12-first": TrellisCode(SHORT.spec, "hyb", flip="first"),
    "mul1": MUL1,
}
# Outputs, inputs, multiprocessors. Several blocks work for one strip where those are many, and in
# the last shape warps for two strips, of which one lacks half of its outputs.
SHAPES = [(16, 16, 132), (48, 80, 132), (272, 320, 5), (96, 1040, 7), (176, 1040, 3)]
ROWS = (1, 3, 8, 9, 16, 17, 48)
GUARD = 64


class Machine:
    """Launches on the host; a kernel's threads run in one order and the other by turns."""

    def __init__(self, library: Library) -> None:
        self.library, self.multiprocessors = library, 132
        self.started: list[str] = []

    def prepare(
        self,
        kernel: Kernel,
        blocks: int,
        shared_bytes: int,
        structures: Sequence[tuple[int, list[int]]],
        *,
        overlap: bool,
    ) -> Launch:
        ((_, numbers),) = structures
        return Launch(self, kernel, blocks, shared_bytes, numbers)


class Launch:
    """Stands in for ``Prepared``."""

    def __init__(
        self, machine: Machine, kernel: Kernel, blocks: int, shared_bytes: int, numbers: list[int]
    ) -> None:
        self.machine, self.kernel, self.numbers = machine, kernel, numbers
        self.sizes = blocks, kernel.threads, shared_bytes

    def __call__(self, device: int, pointers: Sequence[Sequence[int]]) -> None:
        ((codes, table, x, partial, signs, scales, norm),) = pointers
        batch, out_blocks, in_blocks, shares, *_, kind, _ = self.numbers
        inputs, of_x = 16 * in_blocks, 4 if signs and kind == TYPES[torch.float32] else 2
        constants = [(codes, out_blocks * in_blocks * 64)]
        if self.kernel.name.startswith("hyb"):
            constants.append((table, 4096))
        if signs:
            constants.append((signs, inputs // 8))
        if scales:
            constants.append((scales, 2 * inputs))

        count = shares * batch * out_blocks * 16
        guarded = torch.full((count + 2 * GUARD,), torch.nan)
        sums = guarded[GUARD:-GUARD]
        addresses = codes, table, x, sums.data_ptr(), signs, scales, norm
        name, started = self.kernel.name, self.machine.started
        backwards = started.count(name) % 2 == 1
        started.append(name)
        self.machine.library.launch(
            name,
            struct.pack("7Q", *addresses) + packed(self.numbers),
            *self.sizes,
            backwards=backwards,
            constants=constants,
            written=[(x, batch * inputs * of_x)],
        )
        assert bool(guarded[:GUARD].isnan().all() and guarded[-GUARD:].isnan().all())
        ctypes.memmove(partial, sums.data_ptr(), 4 * count)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("host"), "decode.cu", KERNELS)


@pytest.fixture
def machine(library: Library, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(library)
    monkeypatch.setattr(decode_cuda, "Prepared", machine.prepare)
    monkeypatch.setattr(decode_cuda, "multiprocessors", lambda _: machine.multiprocessors)
    monkeypatch.setattr(decode_cuda, "_prepared", decode_cuda._prepared.__wrapped__)
    monkeypatch.setattr(decode_cuda, "_MORE_THAN_HALF", 0)  # no more than what is used
    return machine


def problem(
    code: TrellisCode, out: int, inputs: int, rows: int
) -> tuple[CodeValues, Tensor, Tensor]:
    """Values, codes and float32 activations."""
    generator = torch.Generator().manual_seed(out + inputs + rows)
    shape = (out * inputs // 256, 32)
    codes = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16)
    x = torch.randn(rows, inputs, generator=generator)
    return CodeValues.of(code, code.codebook()), codes, x


def tolerance(code: TrellisCode) -> float:
    return 4e-4 if code.name == "hyb" else 3e-6  # HYB's table is float16


@pytest.mark.parametrize("name", CODES)
def test_products(machine: Machine, name: str) -> None:
    code = CODES[name]
    for (out, inputs, processors), rows in product(SHAPES, ROWS):
        machine.multiprocessors = processors
        values, codes, x = problem(code, out, inputs, rows)
        found = decode_cuda.multiply(x.half(), codes, values.table, code, out)
        exact = decode_matmul(x.half(), codes, values, code, out, backend="torch")
        assert relative(found.sum(0) * values.factor, exact) < tolerance(code), (out, inputs, rows)
    for variant in decode_cuda.VARIANTS[decode_cuda.kind_of(code)]:
        assert machine.started.count(variant.kernel.name) > 1


@pytest.mark.parametrize("code", [HYB, SHORT, MUL1], ids=lambda code: f"{code.name}{code.spec.L}")
def test_products_by_strips(machine: Machine, code: TrellisCode) -> None:
    sylvester = torch.ones(1, 1)
    for _ in range(5):
        sylvester = torch.kron(sylvester, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    machine.multiprocessors = 3
    for rows in (1, 3):
        values, codes, x = problem(code, 96, 1040, rows)
        x = x.half()
        found = decode_cuda.multiply(x, codes, values.table, code, 96, by_strips=True)
        exact = decode_matmul(x, codes, values, code, 96, backend="torch")
        exact = (exact.view(rows, 3, 32) @ sylvester).flatten(1)
        assert relative(found.sum(0) * values.factor, exact) < tolerance(code)


@pytest.mark.parametrize("code", [HYB, SHORT, MUL1], ids=lambda code: f"{code.name}{code.spec.L}")
@pytest.mark.parametrize(
    ("inputs", "block", "dtype"),
    [
        (128, None, torch.float32),
        (512, None, torch.float16),
        (2048, None, torch.bfloat16),
        (384, 128, torch.bfloat16),
        (640, 32, torch.float16),
    ],
)
def test_rotated_row(
    machine: Machine, code: TrellisCode, inputs: int, block: int | None, dtype: torch.dtype
) -> None:
    values, codes, x = problem(code, 48, inputs, 1)
    x = x.to(dtype)
    channels = (torch.rand(inputs, generator=torch.Generator().manual_seed(0)) + 0.5).half()
    multiple = 128 if block else 16
    rotation = Incoherence.random(inputs, 48, seed=1, multiple=multiple, block=block)
    signs = pack_signs(rotation.in_signs)
    for machine.multiprocessors, scales in ((5, channels), (2, None)):
        assert decode_cuda.rotates(code, x, scales, multiple, block)
        found, norm = decode_cuda.rotate_and_multiply(
            x, signs, scales, codes, values.table, code, 48, block
        )
        scaled = x.double() if scales is None else x.double() * scales.double()
        largest = scaled.abs().max()
        rotated = (rotation.rotate_input(scaled) / largest).half()
        exact = decode_matmul(rotated, codes, values, code, 48, backend="torch")
        assert relative(found.sum(0) * values.factor, exact) < 4e-4
        assert relative(norm, largest) < 1e-6
    kernel = decode_cuda.ROTATING[decode_cuda.kind_of(code)].kernel.name
    assert machine.started == [kernel, kernel]
