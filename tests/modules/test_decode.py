"""Products with packed weights: the Triton kernels against the reference.

Without a GPU they run under Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from cuda_graph import capture
from torch import Tensor

from softtrellis.modules import decode_cuda, decode_triton
from softtrellis.modules.decode import CodeValues, decode, decode_matmul
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TrellisSpec
from softtrellis.transforms.incoherence import Incoherence, pack_signs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (1, 2, 3, 16, 17)
CODES = [
    *(TrellisCode(TrellisSpec(16, k, 2), "hyb", order="rows") for k in (1, 2, 3, 4)),
    TrellisCode(TrellisSpec(16, 2, 2), "hyb", flip="first", order="exl3"),
    TrellisCode(TrellisSpec(12, 2, 2), "hyb"),
    *(TrellisCode(TrellisSpec(16, k, 1), "mul1", order="exl3") for k in (1, 2, 3, 4)),
    TrellisCode(TrellisSpec(16, 2, 1), "mul1", normalize=False),
    TrellisCode(TrellisSpec(16, 2, 1), "1mad"),
    TrellisCode(TrellisSpec(16, 3, 1), "1mad", normalize=False, order="exl3"),
    TrellisCode(TrellisSpec(16, 2, 1), "3inst"),
    TrellisCode(TrellisSpec(16, 2, 1), "mcg", normalize=False, order="exl3"),
    TrellisCode(TrellisSpec(12, 4, 1), "mcg"),
    TrellisCode(TrellisSpec(8, 2, 1), "gaussian"),
    TrellisCode(TrellisSpec(8, 2, 1), "scalar"),
    TrellisCode(TrellisSpec(8, 3, 2), "gaussian", order="exl3"),
]
CODE = CODES[1]


def name_of(code: object) -> str:
    if not isinstance(code, TrellisCode):
        return str(code)
    spec = code.spec
    plain = "" if code.normalize else "-plain"
    return f"{code.name}-L{spec.L}k{spec.k}V{spec.V}-{code.order}{plain}"


def random_codes(out: int, inputs: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(out + inputs + k)
    shape = (out * inputs // 256, 16 * k)
    words = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator)
    return words.to(device=DEVICE, dtype=torch.int16)


def values_of(code: TrellisCode) -> CodeValues:
    return CodeValues.of(code, code.codebook().to(DEVICE))


def relative(ours: Tensor, exact: Tensor) -> float:
    assert bool(torch.isfinite(ours).all())
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("code", CODES, ids=name_of)
def test_decoded_matrix(code: TrellisCode) -> None:
    codes, values = random_codes(48, 80, code.spec.k), values_of(code)
    exact = decode(codes, values.codebook, code, 48, 80)
    ours = decode_triton.decode(codes, values.table, code, 48, 80, torch.float32, values.factor)
    rounding = 2.0**-11 if code.name in ("hyb", "gaussian", "scalar") else 2.0**-22
    torch.testing.assert_close(ours, exact, rtol=rounding, atol=1e-7)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("code", CODES, ids=name_of)
def test_product(code: TrellisCode, rows: int) -> None:
    codes, values = random_codes(48, 80, code.spec.k), values_of(code)
    x = torch.randn(rows, 80, generator=torch.Generator().manual_seed(rows)).half().to(DEVICE)
    exact = decode_matmul(x, codes, values, code, 48, backend="torch")
    ours = decode_matmul(x, codes, values, code, 48, backend="triton")
    assert ours.dtype == torch.float32
    assert relative(ours, exact) < 1e-3


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "launch",
    [
        decode_triton.Launch(out_blocks=1, in_blocks=1, splits=5, warps=1),
        decode_triton.Launch(out_blocks=2, in_blocks=4, splits=2),
        decode_triton.Launch(out_blocks=2, in_blocks=2, splits=1, dot=False),
        decode_triton.Launch(out_blocks=4, in_blocks=2, splits=3, dot=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("code", [CODES[1], CODES[7]], ids=name_of)
def test_product_cut_in_other_ways(code: TrellisCode, launch: decode_triton.Launch) -> None:
    codes, values = random_codes(48, 80, 2), values_of(code)
    x = torch.randn(1, 80, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    partial = decode_triton.multiply(x, codes, values.table, code, 48, launch)
    ours = partial.sum(0) * values.factor
    assert relative(ours, decode_matmul(x, codes, values, code, 48, backend="torch")) < 1e-3


def test_large_and_cold_activations_stay_finite() -> None:
    module = random_layer(LAYERS["qtip"])
    x = torch.zeros(3, module.in_features)
    x[0, 5] = 1e30
    x[1] = 1e-30
    ours = with_backend(module, "triton")(x.to(DEVICE))
    exact = with_backend(module, "torch")(x.to(DEVICE))
    for row, right in zip(ours, exact, strict=True):
        assert relative(row, right) < 1e-3


LAYERS = {
    "qtip": LayerFormat(80, 48, CODE, bias=True, in_scales=True, channel_scales=True),
    "padded": LayerFormat(172, 70, CODES[0]),
    "paley": LayerFormat(48, 240, CODES[8]),
    "two_blocks": LayerFormat(944, 32, CODE, channel_scales=True),
    "exl3": LayerFormat(
        130,
        100,
        TrellisCode(TrellisSpec(16, 2, 1), "mul1", normalize=False, order="exl3"),
        multiple=128,
        block=128,
        channel_scales=True,
    ),
}


def random_layer(layer: LayerFormat) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(3)
    module = QuantizedLinear(layer, layer.code.codebook()).to(DEVICE)
    rows, columns = layer.padded
    module.codes.copy_(random_codes(rows, columns, layer.code.spec.k))
    module.scale.fill_(0.37)
    for signs, width in ((module.in_signs, columns), (module.out_signs, rows)):
        signs.copy_(torch.randint(256, signs.shape, generator=generator))
        if width % 8:
            signs[-1] = 0
    for channels in (module.in_scale, module.out_scale, module.bias):
        if channels is not None:
            channels.copy_(torch.rand(channels.shape, generator=generator) + 0.5)
    return module


def with_backend(module: QuantizedLinear, backend: str) -> QuantizedLinear:
    module.backend = backend  # type: ignore[assignment]
    return module


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("name", "rows"),
    [("two_blocks", 1), *((n, r) for n in LAYERS if n != "two_blocks" for r in ROWS)],
)
def test_layer(name: str, rows: int) -> None:
    module = random_layer(LAYERS[name])
    x = torch.randn(rows, module.in_features, generator=torch.Generator().manual_seed(rows))
    x = x.to(DEVICE)
    exact = with_backend(module, "torch")(x)
    ours = with_backend(module, "triton")(x)
    assert ours.dtype == x.dtype
    assert relative(ours, exact) < 1e-3
    stacked = with_backend(module, "triton")(x.half().unsqueeze(1))
    assert stacked.shape == (rows, 1, module.out_features)
    assert relative(stacked[:, 0].float(), exact) < 2e-3


def test_layer_as_one_operator() -> None:
    module = with_backend(random_layer(LAYERS["qtip"]), "triton")
    x = torch.randn(2, 80, device=DEVICE)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
    assert module(x[:0]).shape == (0, 48)


def test_who_computes() -> None:
    module = random_layer(LAYERS["padded"])
    x = torch.randn(2, 172, device=DEVICE)
    assert torch.equal(module(x), with_backend(module, "torch")(x))
    with pytest.raises(ValueError, match="no gradient for the activations"):
        with_backend(module, "triton")(x.requires_grad_())
    with pytest.raises(ValueError, match="float16, bfloat16 or float32"):
        module(x.detach().double())
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        with_backend(module, "fast")(x.detach())


@pytest.mark.skipif(DEVICE == "cuda", reason="says what is missing without a GPU")
def test_cuda_without_a_gpu() -> None:
    module = with_backend(random_layer(LAYERS["padded"]), "cuda")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        module(torch.zeros(1, 172))


@pytest.mark.parametrize(("warps", "processors"), [(8, 3), (16, 132), (32, 7)])
@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (4096, 11008), (576, 1536), (9600, 144)])
def test_every_unit_of_work_is_dealt(shape: tuple[int, int], warps: int, processors: int) -> None:
    strips, row = -(-shape[0] // 32), -(-shape[1] // 128)
    deal = decode_cuda.Deal.of(*shape, warps, processors)
    counts = [deal.least + (block < deal.more) for block in range(deal.grid)]
    assert sum(counts) == strips * row
    assert min(counts) > 0
    owner = [block for block, count in enumerate(counts) for _ in range(count)]
    rows = [owner[i * row : (i + 1) * row] for i in range(strips)]
    assert deal.shares == max(blocks[-1] - blocks[0] + 1 for blocks in rows)
    assert -(-max(counts) // warps) <= row  # so that a warp meets at most two strips


@pytest.mark.parametrize("inputs", [16, 4096, 28672, 1 << 20])
def test_there_is_a_kernel_for_all_rows(inputs: int) -> None:
    for variants in decode_cuda.VARIANTS.values():
        assert all(any(v.takes(rows, inputs) for v in variants) for rows in range(1, 17))


def test_what_products_rotate_themselves() -> None:
    def rotates(code: TrellisCode, inputs: int, block: int | None, rows: int = 1) -> bool:
        x = torch.zeros(rows, inputs, dtype=torch.bfloat16)
        return decode_cuda.rotates(code, x, None, 128 if block else 16, block)

    hyb, mul1 = CODES[1], CODES[7]
    assert rotates(CODES[5], 4096, None)
    assert all(rotates(hyb, inputs, None) for inputs in (128, 2048, 4096, 8192))
    assert all(rotates(mul1, inputs, 128) for inputs in (128, 4096, 11008, 14336))
    assert not any(rotates(hyb, inputs, None) for inputs in (16, 64, 576, 11008, 14336, 32768))
    assert not rotates(mul1, 4000, 128)
    assert not rotates(hyb, 4096, None, rows=2)
    assert not rotates(CODES[0], 4096, None)


def test_codes_of_another_shape() -> None:
    codes, values = random_codes(48, 80, 2), values_of(CODE)
    with pytest.raises(ValueError, match="do not hold a matrix 32x80"):
        decode_matmul(torch.zeros(1, 80, device=DEVICE), codes, values, CODE, 32)


SHAPES = [(4096, 11008), (11008, 4096), (2048, 8192), (576, 1536), (1536, 576), (4096, 14336)]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [*ROWS, 33, 48, 49])
@pytest.mark.parametrize("code", [CODE, CODES[5]], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_at_full_size(shape: tuple[int, int], code: TrellisCode, rows: int) -> None:
    module = random_layer(LayerFormat(shape[1], shape[0], code, channel_scales=True))
    x = torch.randn(rows, shape[1], device=DEVICE, dtype=torch.bfloat16)
    exact = with_backend(module, "torch")(x.float())
    ours = with_backend(module, "auto")(x)
    assert relative(ours.float(), exact) < 5e-3
    again = with_backend(module, "auto")(x)
    assert torch.equal(again, ours)
    assert relative(with_backend(module, "triton")(x).float(), exact) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("code", "inputs", "block"),
    [(CODES[1], n, None) for n in (128, 256, 512, 1024, 2048, 4096, 8192)]
    + [(CODES[5], n, None) for n in (128, 2048, 4096)]
    + [(CODES[7], n, b) for n, b in ((128, 128), (640, 32), (4096, None), (11008, 128))],
    ids=str,
)
def test_product_that_rotates_its_row(
    code: TrellisCode, inputs: int, block: int | None, scaled: bool, dtype: torch.dtype
) -> None:
    out = 4096 if inputs > 512 else 80
    codes, values = random_codes(out, inputs, 2), values_of(code)
    rotation = Incoherence.random(inputs, out, seed=inputs, block=block, multiple=block or 16)
    x = torch.randn(1, inputs, device=DEVICE).to(dtype)
    scales = torch.rand(inputs, device=DEVICE).half() if scaled else None
    signs = pack_signs(rotation.in_signs).to(DEVICE)
    results = [
        decode_cuda.rotate_and_multiply(x, signs, scales, codes, values.table, code, out, block)
        for _ in range(2)
    ]
    exact = x.double() if scales is None else x.double() * scales.double()
    (product, norm), again = results
    assert torch.equal(product, again[0])
    assert torch.equal(norm.double(), exact.abs().amax(1).float().double())
    turned = rotation.rotate_input(exact.cpu()).to(DEVICE) / norm
    right = decode_matmul(turned.half(), codes, values, code, out, backend="torch")
    assert relative(product.sum(0) * values.factor, right) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [*range(1, 17), 17, 33, 48])
@pytest.mark.parametrize("code", [CODES[1], CODES[5], CODES[7]], ids=name_of)
def test_product_in_cuda(code: TrellisCode, rows: int) -> None:
    for out, inputs in ((16, 16), (48, 80), (272, 320), (1536, 576)):
        codes, values = random_codes(out, inputs, 2), values_of(code)
        x = torch.randn(rows, inputs, device=DEVICE).half()
        exact = decode_matmul(x, codes, values, code, out, backend="torch")
        ours = decode_matmul(x, codes, values, code, out, backend="cuda")
        assert relative(ours, exact) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("code", CODES, ids=name_of)
def test_product_at_full_size(code: TrellisCode) -> None:
    codes, values = random_codes(2048, 8192, code.spec.k), values_of(code)
    x = torch.randn(16, 8192, device=DEVICE).half()
    exact = decode_matmul(x, codes, values, code, 2048, backend="torch")
    for backend, rows in ((b, r) for b in ("triton", "cuda") for r in (1, 8, 16)):
        ours = decode_matmul(x[:rows], codes, values, code, 2048, backend=backend)  # type: ignore[arg-type]
        assert relative(ours, exact[:rows]) < 1e-3


@pytest.mark.gpu
def test_layer_in_a_cuda_graph() -> None:
    module = random_layer(LayerFormat(4096, 2048, CODE))
    x = torch.randn(1, 4096, device=DEVICE, dtype=torch.bfloat16)
    replay = capture(lambda: [module(x)])
    for _ in range(2):
        x.normal_()
        assert torch.equal(replay()[0], module(x))
