"""Rotations of activations around a packed product: the kernels against ``Incoherence``.

Without a GPU the Triton ones run under Triton's interpreter, on small widths.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from cuda_graph import capture
from torch import Tensor

from softtrellis.transforms import rotation_cuda, rotation_triton
from softtrellis.transforms.hadamard import kronecker_factors
from softtrellis.transforms.incoherence import Incoherence, pack_signs
from softtrellis.transforms.packed_signs import Factor, packed_signs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.param(rotation_triton, id="triton")
CUDA = pytest.param(rotation_cuda, id="cuda", marks=pytest.mark.gpu)
SMALL = [  # in, out, multiple, block
    (80, 48, 16, None),
    (172, 70, 16, None),
    (48, 240, 16, None),
    (944, 32, 16, None),
    (130, 100, 128, 128),
]
LARGE = [
    (577, 31, 1, None),
    (576, 1536, 16, None),
    (2048, 8192, 16, None),
    (4096, 11008, 16, None),
    (14336, 4096, 16, None),
    (8960, 13824, 16, None),
    (2020, 4072, 16, None),
    (11008, 4096, 128, 128),
    (576, 192, 64, 64),
]
HALF_ROUNDING, BFLOAT_ROUNDING = 5e-4, 4e-3
ROUNDING = {torch.float32: 1e-5, torch.float16: HALF_ROUNDING, torch.bfloat16: BFLOAT_ROUNDING}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def relative(ours: Tensor, exact: Tensor) -> float:
    assert bool(torch.isfinite(ours).all())
    return float((ours.double() - exact).norm() / exact.norm())


def rotation_of(shape: tuple[int, int, int, int | None]) -> Incoherence:
    inputs, outputs, multiple, block = shape
    rotation = Incoherence.random(inputs, outputs, seed=1, multiple=multiple, block=block)
    return rotation.to(DEVICE)


def check_input(kernels: ModuleType, rotation: Incoherence, x: Tensor, *, scaled: bool) -> None:
    scales = (randn(rotation.in_features).abs() + 0.5).half() if scaled else None
    exact = x.double() * (1 if scales is None else scales.double())
    ours, norms = kernels.rotate_input(
        x, pack_signs(rotation.in_signs), scales, multiple=rotation.multiple, block=rotation.block
    )
    assert ours.dtype == torch.float16
    torch.testing.assert_close(norms.double(), exact.abs().amax(1), rtol=1e-6, atol=0)
    unscaled = ours.double() * norms.double()[:, None]
    assert relative(unscaled, rotation.rotate_input(exact)) < HALF_ROUNDING


def check_output(
    kernels: ModuleType, rotation: Incoherence, partial: Tensor, dtype: torch.dtype, *, scaled: bool
) -> None:
    outputs = rotation.out_features
    norms, scale = randn(partial.shape[1], seed=2).abs() + 0.5, torch.tensor(0.37, device=DEVICE)
    scales = (randn(outputs, seed=3).abs() + 0.5).half() if scaled else None
    bias = randn(outputs, seed=4).to(dtype) if scaled else None
    ours = kernels.unrotate_output(
        partial, norms, pack_signs(rotation.out_signs), scale, scales, bias,
        features=outputs, factor=1.7, dtype=dtype, block=rotation.block,
    )  # fmt: skip
    assert ours.dtype == dtype
    exact = rotation.unrotate_output(partial.double().sum(0))
    exact = exact * 1.7 * scale.double() * norms.double()[:, None]
    if scales is not None and bias is not None:
        exact = exact * scales.double() + bias.double()
    assert relative(ours, exact) < ROUNDING[dtype]


def check(
    kernels: ModuleType,
    shape: tuple[int, int, int, int | None],
    *,
    rows: int,
    dtype: torch.dtype,
    splits: int,
    scaled: bool,
) -> None:
    rotation = rotation_of(shape)
    x = randn(rows, shape[0], seed=5).to(dtype)
    check_input(kernels, rotation, x, scaled=scaled)
    check_output(kernels, rotation, randn(splits, rows, rotation.out_pad), dtype, scaled=scaled)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kernels", [TRITON, CUDA])
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_rotations(
    kernels: ModuleType, shape: tuple[int, int, int, int | None], scaled: bool
) -> None:
    check(kernels, shape, rows=2, dtype=torch.float32, splits=3, scaled=scaled)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kernels", [TRITON, CUDA])
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_rotations_at_full_size(
    kernels: ModuleType,
    shape: tuple[int, int, int, int | None],
    rows: int,
    dtype: torch.dtype,
) -> None:
    for splits in (1, 9):
        check(kernels, shape, rows=rows, dtype=dtype, splits=splits, scaled=splits > 1)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [SMALL[0], LARGE[3], LARGE[7]], ids=str)
def test_rows_that_are_not_aligned(shape: tuple[int, int, int, int | None]) -> None:
    x = randn(2 * shape[0] + 1).bfloat16()[1:].view(2, -1)
    check_input(rotation_cuda, rotation_of(shape), x, scaled=True)


@pytest.mark.gpu
@pytest.mark.parametrize("slices", rotation_cuda.CLUSTERS)
@pytest.mark.parametrize("threads", [256, 512])
def test_rows_cut_in_other_ways(slices: int, threads: int) -> None:
    launch = rotation_cuda.Launch(slices, threads)
    for shape in (LARGE[3], LARGE[7]):
        rotation = rotation_of(shape)
        x, signs = randn(3, shape[0]), pack_signs(rotation.in_signs)
        ours, norms = rotation_cuda.rotate_input(
            x, signs, None, multiple=rotation.multiple, block=rotation.block, launch=launch
        )
        exact = rotation.rotate_input(x.double()) / norms.double()[:, None]
        assert relative(ours, exact) < HALF_ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 300])
def test_what_kernels_before_it_write_is_seen(rows: int) -> None:
    """The rotation begins while they, or copies, end: in a stream and in a graph, many times."""
    rotation = rotation_of((4096, 4096, 16, None))
    signs, one = pack_signs(rotation.in_signs), torch.ones((), device=DEVICE)
    drawn = randn(rows, 4096)
    x, product, now = torch.zeros_like(drawn), torch.zeros_like(drawn), torch.zeros_like(signs)

    def step() -> list[Tensor]:
        found = []
        for i in range(20):
            torch.bitwise_xor(signs, i, out=now)
            torch.mul(drawn, i + 1.0, out=product if i % 2 else x)
            if i % 2:
                x.copy_(product)
            rotated, norms = rotation_cuda.rotate_input(x, now, None)
            back = rotation_cuda.unrotate_output(
                rotated.float()[None], norms, now, one, None, None,
                features=4096, factor=1.0, dtype=torch.float32,
            )  # fmt: skip
            again, _ = rotation_cuda.rotate_input(back, now, None)
            found += [rotated, back, again]
        return found

    results = [step(), capture(step)()]
    for i, (rotated, back, again) in enumerate(zip(*[iter(results[0])] * 3, strict=True)):
        assert relative(back, drawn.double() * (i + 1.0)) < HALF_ROUNDING
        assert relative(again, rotated.double()) < 2 * HALF_ROUNDING
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


@pytest.mark.parametrize("order", [12, 16, 80, 128])
@pytest.mark.parametrize("factor", ["left", "right"])
def test_packed_signs(order: int, factor: Factor) -> None:
    """Every entry of the matrix is where a lane of a matrix instruction looks for it."""
    left, right = kronecker_factors(order)
    matrix = torch.kron(left, right)
    packed = packed_signs(matrix, factor)
    assert packed.dtype == torch.int32
    assert packed.shape == (-(-order // 16), -(-order // 64), 32)
    for row in range(0, order, 5):
        for column in range(order):
            t, h, g = row // 16, row // 8 % 2, row % 8
            w, s, rest = column // 64, column // 16 % 4, column % 16
            if factor == "right":
                q, p, e = rest // 4, rest // 2 % 2, rest % 2
            else:
                p, e, q = rest // 8, rest // 4 % 2, rest % 4
            word = int(packed[t, w, 4 * g + q])
            negative = word >> (15 - (4 * s + h + 2 * p) + 16 * e) & 1
            assert (matrix[row, column] < 0) == negative


def sylvester(n: int) -> Tensor:
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    return two[:1, :1] if n == 1 else torch.kron(two, sylvester(n // 2))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("splits", [1, 3, 9])
@pytest.mark.parametrize(
    "widths", [(32,), (1024, 2048, 1536, 4096, 8192), (11008,), (14336, 14336), (28672,)], ids=str
)
def test_outputs_whose_strips_are_transformed(
    widths: tuple[int, ...], splits: int, rows: int
) -> None:
    whole, norms = randn(splits, rows, sum(widths)), randn(rows).abs() + 0.5
    strips = (whole.unflatten(-1, (-1, 32)) @ sylvester(32).to(whole)).flatten(-2)
    rotations = [rotation_of((32, width, 16, None)) for width in widths]
    layers = [
        (pack_signs(rotation.out_signs), randn(), scales, scales, rotation.out_features)
        for rotation, scales in zip(
            rotations, [randn(n).half() if n != 2048 else None for n in widths], strict=True
        )
    ]
    found = rotation_cuda.unrotate_outputs(
        strips.split(widths, -1), norms, layers, factor=1.5, dtype=torch.float32, by_strips=True
    )
    parts = whole.double().sum(0).split(widths, -1)
    for ours, part, rotation, layer in zip(found, parts, rotations, layers, strict=True):
        _, scale, scales, bias, _ = layer
        exact = rotation.unrotate_output(part) * 1.5 * scale.double() * norms.double()[:, None]
        if scales is not None and bias is not None:
            exact = exact * scales.double() + bias.double()
        assert relative(ours, exact) < ROUNDING[torch.float32]


def test_what_products_begin_to_unrotate() -> None:
    for width in (32, 64, 1024, 1536, 2048, 4096, 8192, 11008, 14336, 28672):
        transform = rotation_cuda.strips_of(width, None)
        assert transform is not None
        assert transform.b in (32, 64, 128)
        if width > 8192:
            _, right = kronecker_factors(width)
            assert torch.equal(right.to(torch.int8), sylvester(transform.b))
        else:
            whole = torch.kron(*kronecker_factors(width))
            assert torch.equal(whole[: transform.b, : transform.b], sylvester(transform.b))
    assert not any(rotation_cuda.by_strips(width, None) for width in (16, 48, 576, 944))
    assert not rotation_cuda.by_strips(4096, 128)


def test_what_cuda_rotates() -> None:
    for width in (16, 576, 944, 1536, 4096, 8192, 11008, 14336, 28672, 53248):
        assert rotation_cuda.runs(width, None)
        (*rest, last) = rotation_cuda.transforms(width, None)
        assert last.first + last.order == width
        assert all(part.a * part.b == part.order for part in (*rest, last))
    assert rotation_cuda.runs(11008, 128)
    assert not rotation_cuda.runs(1 << 20, None)
    assert not rotation_cuda.runs(1 << 13, 1 << 13)


@pytest.mark.parametrize("width", [1, 2, 31, 48, 80, 172, 576, 944, 1536, 11008])
def test_blocks_that_exchange_are_a_cluster(width: int) -> None:
    assert all(t.launch().slices >= 2 for t in rotation_cuda.transforms(width, None))
    with pytest.raises(ValueError, match="a cluster has 2, 4 or 8 blocks, not 1"):
        rotation_cuda.Launch(1, 256)


@pytest.mark.gpu
def test_other_dtypes_are_refused() -> None:
    rotation = rotation_of(SMALL[0])
    x = torch.zeros(1, 80, device=DEVICE, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"must be one of torch\.float16"):
        rotation_cuda.rotate_input(x, pack_signs(rotation.in_signs), None)
