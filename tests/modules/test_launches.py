"""What a packed layer starts on a GPU, seen by a driver that starts nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from softtrellis.modules import decode_cuda, joint_linear, quantized_linear
from softtrellis.modules.joint_linear import JointLinear
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TrellisSpec
from softtrellis.transforms import rotation_cuda
from softtrellis.trellis import launch_cuda

driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")

HYB = TrellisCode(TrellisSpec(16, 2, 2), "hyb", order="rows")
MUL1 = TrellisCode(TrellisSpec(16, 2, 1), "mul1", normalize=False, order="exl3")


class Launch(NamedTuple):
    kernel: str
    sizes: tuple[int, ...]
    attributes: list[str]
    stream: int
    pointers: list[int]
    ints: list[int]


class Machine:
    """A CUDA device that only notes what it is told to start."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.launches: list[Launch] = []
        self.stream, self.device = 7, -1  # the index of tensors on the CPU
        patch.setattr(torch.cuda, "device", self.on)
        patch.setattr(torch.cuda, "current_device", lambda: self.device)
        patch.setattr(torch.cuda, "current_stream", self.current)
        patch.setattr(torch.accelerator, "current_stream", self.current)
        patch.setattr(launch_cuda, "_function", lambda source, name, *_: name)
        patch.setattr(decode_cuda, "multiprocessors", lambda _: 132)
        patch.setattr(driver, "cuLaunchKernelEx", self.start)
        for module in (quantized_linear, joint_linear):
            patch.setattr(module, "resolve_decode_backend", lambda *_: "cuda")

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    def current(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(stream_id=self.stream, cuda_stream=1000 + self.stream)

    def start(self, config: Any, function: str, parameters: int, extra: int) -> tuple[int]:
        assert self.device == -1
        assert (extra, config.numAttrs) == (0, len(config.attrs))
        jobs, pointers, ints = (1, 7, 10) if function.startswith(("hyb", "mul1")) else (4, 9, 18)
        at = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0] or 0
        addresses: list[int] = []
        numbers: list[int] = []
        for _ in range(jobs):
            addresses += (ctypes.c_uint64 * pointers).from_address(at)
            numbers += (ctypes.c_int32 * ints).from_address(at + 8 * pointers)
            at += 8 * pointers + 4 * ints
        sizes = config.gridDimX, config.blockDimX, config.sharedMemBytes
        attributes = [attribute.id.name for attribute in config.attrs]
        stream = int(config.hStream)
        self.launches.append(Launch(function, sizes, attributes, stream, addresses, numbers))
        return (0,)

    def run(self, layer: QuantizedLinear, x: Tensor) -> tuple[Tensor, list[Launch]]:
        self.launches = []
        with torch.no_grad():
            y = layer(x)
        return y, self.launches


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    kept = decode_cuda._prepared, rotation_cuda._prepared
    for prepared in kept:
        prepared.cache_clear()
    yield Machine(monkeypatch)
    for prepared in kept:
        prepared.cache_clear()


def layer_of(code: TrellisCode, block: int | None, scaled: bool) -> QuantizedLinear:
    form = LayerFormat(256, 512, code, block or 16, block, scaled, scaled, scaled)
    return QuantizedLinear(form, torch.zeros(code.spec.num_states, code.spec.V))


def kernels(launches: list[Launch]) -> list[str]:
    return [launch.kernel for launch in launches]


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize("code", [HYB, MUL1], ids=["hyb", "mul1"])
def test_second_call_is_prepared(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    code: TrellisCode,
    block: int | None,
    scaled: bool,
    rows: int,
) -> None:
    layers = [layer_of(code, block, scaled) for _ in range(2)]
    inputs = [torch.zeros(1, rows, 256, dtype=torch.bfloat16) for _ in range(2)]
    y, first = machine.run(layers[0], inputs[0])
    assert y.shape == (1, rows, 512)
    assert len(first) == (2 if rows == 1 else 3)

    def anew(*_: object, **__: object) -> None:
        raise AssertionError("a launch was prepared again")

    monkeypatch.setattr(launch_cuda.Prepared, "__init__", anew)
    z, second = machine.run(layers[1], inputs[1])
    assert [launch[:4] for launch in first] == [launch[:4] for launch in second]
    assert [launch.ints for launch in first] == [launch.ints for launch in second]
    for result, layer, x, launches in zip((y, z), layers, inputs, (first, second), strict=True):
        there = {address for launch in launches for address in launch.pointers}
        buffers = [layer.codes, layer.in_signs, layer.out_signs, layer.scale, layer.in_scale]
        tensors = [x, result, *buffers, layer.out_scale, layer.bias]
        assert {tensor.data_ptr() for tensor in tensors if tensor is not None} <= there
        assert layer.codes.data_ptr() in launches[-2].pointers
        assert launches[-2].pointers[3] == launches[-1].pointers[0]


def test_each_stream_has_its_launch(machine: Machine) -> None:
    layer, x = layer_of(HYB, None, False), torch.zeros(1, 256, dtype=torch.float16)
    streams = []
    for machine.stream in (7, 8, 7):
        _, launches = machine.run(layer, x)
        streams.append([launch.stream for launch in launches])
    assert streams == [[1007] * 2, [1008] * 2, [1007] * 2]


def test_another_device_is_entered_and_left(machine: Machine) -> None:
    layer, x = layer_of(HYB, None, False), torch.zeros(2, 256, dtype=torch.float16)
    _, expected = machine.run(layer, x)
    machine.device = 3
    _, launches = machine.run(layer, x)
    assert kernels(launches) == kernels(expected)
    assert machine.device == 3


def test_what_is_not_aligned(machine: Machine) -> None:
    layer = layer_of(HYB, None, False)
    x = torch.zeros(257, dtype=torch.float16)[1:].view(1, 256)
    _, launches = machine.run(layer, x)
    assert kernels(launches) == ["rotate_input", "hyb_one_row", "unrotate_columns"]
    layer.codes = torch.zeros(layer.codes.numel() + 1, dtype=torch.int16)[1:].view_as(layer.codes)
    _, (product, _) = machine.run(layer, x.clone())
    assert product.kernel == "hyb_rotating"
    assert product.pointers[0] not in (0, layer.codes.data_ptr())
    assert product.attributes == []


def test_layers_of_one_product(machine: Machine) -> None:
    joint = JointLinear([layer_of(HYB, None, True) for _ in range(5)])
    for _ in range(2):
        machine.launches = []
        with torch.no_grad():
            found = joint(torch.zeros(1, 2, 256, dtype=torch.bfloat16))
        assert [y.shape for y in found] == [(1, 2, 512)] * 5
        rotated = ["unrotate_columns"] * 2
        assert kernels(machine.launches) == ["rotate_input", "hyb_rows_8", *rotated]
        places = [y.data_ptr() for y in found]
        assert machine.launches[2].pointers[1::9] == places[:4]
        assert machine.launches[3].pointers[1::9] == places[4:] * 4
    with pytest.raises(ValueError, match="x has 128 channels and must have 256"), torch.no_grad():
        joint(torch.zeros(4, 128))
    machine.launches = []
    with pytest.raises(ValueError, match="x has 128 channels and must have 256"), torch.no_grad():
        layer_of(HYB, None, True)(torch.zeros(4, 128))
    assert machine.launches == []


def test_tensors_without_memory_start_nothing(machine: Machine) -> None:
    with FakeTensorMode(), torch.no_grad():
        layer = layer_of(HYB, None, True)
        y = layer(torch.zeros(1, 3, 256, dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((1, 3, 512), torch.bfloat16)
    assert machine.launches == []
