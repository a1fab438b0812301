"""Layers of the same inputs as one product: against each of them by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from cuda_graph import capture
from torch import Tensor

from softtrellis.modules.decode import DecodeBackend
from softtrellis.modules.joint_linear import JointLinear
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TrellisSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HYB = TrellisCode(TrellisSpec(16, 2, 2), "hyb")
MUL1 = TrellisCode(TrellisSpec(16, 2, 1), "mul1", normalize=False, order="exl3")
FORMS = {
    "hyb": LayerFormat(80, 1, HYB, channel_scales=True, in_scales=True, bias=True),
    "exl3": LayerFormat(130, 1, MUL1, multiple=128, block=128, channel_scales=True),
}


def random_layers(
    form: LayerFormat, outputs: tuple[int, ...], backend: DecodeBackend
) -> list[QuantizedLinear]:
    generator = torch.Generator().manual_seed(1)
    layers: list[QuantizedLinear] = []
    values = form.code.codebook()
    for out in outputs:
        layer = QuantizedLinear(replace(form, out_features=out), values, backend)
        layer.codes.random_(-(1 << 15), 1 << 15, generator=generator)
        layer.out_signs.random_(256, generator=generator)
        layer.in_signs.fill_(0b10110010)
        layer.scale.fill_(0.1 + 0.1 * len(layers))
        for channels in (layer.out_scale, layer.bias):
            if channels is not None:
                channels.copy_(torch.rand(out, generator=generator) + 0.5)
        if layer.in_scale is not None:
            layer.in_scale.copy_(torch.linspace(0.5, 1.5, form.in_features))
        layers.append(layer.to(DEVICE))
    return layers


def agree(found: tuple[Tensor, ...], exact: list[Tensor]) -> None:
    assert [y.shape for y in found] == [y.shape for y in exact]
    for ours, theirs in zip(found, exact, strict=True):
        assert bool(torch.isfinite(ours).all())
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "backend", ["torch", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_same_as_each_layer(form: LayerFormat, rows: int, backend: DecodeBackend) -> None:
    outputs = (48, 70, 16)
    joint = JointLinear(random_layers(form, outputs, backend))
    x = torch.randn(rows, 1, form.in_features, generator=torch.Generator().manual_seed(rows))
    exact = [layer(x.to(DEVICE)) for layer in random_layers(form, outputs, "torch")]
    agree(joint(x.to(DEVICE)), exact)
    assert [y.shape[0] for y in joint(x[:0].to(DEVICE))] == [0, 0, 0]


def test_codes_are_kept_once() -> None:
    layers = random_layers(FORMS["hyb"], (48, 32), "torch")
    joint = JointLinear(layers)
    assert layers[1].codes.data_ptr() == joint.codes[layers[0].layer.tiles :].data_ptr()
    assert "codes" not in joint.state_dict()


def test_layers_that_differ_are_refused() -> None:
    first, second = random_layers(FORMS["hyb"], (48, 32), "torch")
    second.in_signs[3] ^= 1
    second.backend = "auto"
    with pytest.raises(ValueError, match="must not differ in backend, in_signs"):
        JointLinear([first, second])


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    form = replace(FORMS["hyb"], in_features=4096, bias=False)
    joint = JointLinear(random_layers(form, (4096, 1024, 1024), "cuda"))
    x = torch.randn(1, 4096, device=DEVICE)
    replay = capture(lambda: list(joint(x)))
    for _ in range(3):
        x.normal_()
        for ours, exact in zip(replay(), joint(x), strict=True):
            assert torch.equal(ours, exact)
