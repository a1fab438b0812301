import hashlib
import math

import pytest
import torch

from softtrellis.transforms.hadamard import (
    _stages,
    hadamard_blocks,
    hadamard_matrix,
    hadamard_transform,
)

MODEL_DIMENSIONS = [
    *(64, 176, 192, 576, 896, 1152, 1536, 2048, 2304, 2560, 2880, 3072, 4096, 4864, 5120, 6912),
    *(8192, 8960, 9216, 9728, 11008, 13824, 14336, 17408, 18944, 25600, 27648, 28672, 29568),
    53248,
]
AWKWARD_DIMENSIONS = [1, 2, 3, 6, 7, 10, 172, 577, 578, 1001, 13696]
FIELDS = {  # order: the field that Paley's construction needs
    12: "GF(11)",
    28: "GF(27)",
    36: "GF(17), second construction",
    52: "GF(25), second construction",
    100: "GF(49), second construction",
    244: "GF(243)",
    344: "GF(343)",
    1252: "GF(625), second construction",
}


def vectors(n: int, dtype: torch.dtype = torch.float64, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, n, dtype=dtype, generator=torch.Generator().manual_seed(n))


def assert_hadamard(matrix: torch.Tensor, n: int) -> None:
    assert matrix.shape == (n, n)
    assert torch.equal(matrix.abs(), torch.ones(n, n))
    assert torch.equal(matrix @ matrix.mT, n * torch.eye(n))  # small integers: exact in float32


@pytest.mark.parametrize("order", FIELDS, ids=[f"{n}-{field}" for n, field in FIELDS.items()])
def test_paley_matrices_are_exactly_orthogonal(order):
    assert_hadamard(hadamard_matrix(order), order)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 24, 64, 112, 128, 144, 176, 192, 240, 576])
def test_products_are_exactly_orthogonal(n):
    assert_hadamard(hadamard_matrix(n), n)


@pytest.mark.parametrize("n", MODEL_DIMENSIONS)
def test_every_dense_factor_of_a_model_dimension_is_small_and_exactly_orthogonal(n):
    assert hadamard_blocks(n) == (n,)
    for stage in _stages(n):
        for order in stage:
            assert order <= 344
            assert_hadamard(hadamard_matrix(order), order)


@pytest.mark.parametrize("n", [*MODEL_DIMENSIONS, *AWKWARD_DIMENSIONS])
def test_transform_is_orthogonal_and_inverse_undoes_it(n):
    x = vectors(n)
    y = hadamard_transform(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y @ y.mT, x @ x.mT, rtol=1e-12, atol=1e-12 * n)
    torch.testing.assert_close(hadamard_transform(y, inverse=True), x, rtol=0, atol=1e-12)
    z = hadamard_transform(x, inverse=True)
    torch.testing.assert_close(hadamard_transform(z), x, rtol=0, atol=1e-12)
    if n > 4:
        assert not torch.allclose(y, x, atol=0.1)


def test_blocks_add_up_for_every_size():
    for n in range(1, 400):
        blocks = hadamard_blocks(n)
        assert sum(blocks) == n
        assert all(order in (1, 2) or order % 4 == 0 for order in blocks)
        assert list(blocks) == sorted(blocks, reverse=True)
    assert hadamard_blocks(172) == (168, 4)
    assert hadamard_blocks(577) == (576, 1)
    assert hadamard_blocks(7) == (4, 2, 1)


@pytest.mark.parametrize("n", [1, 2, 12, 20, 64, 128, 176, 192, 288, 496, 576])
@pytest.mark.parametrize("inverse", [False, True])
def test_transform_is_multiplication_by_the_matrix(n, inverse):
    dense = hadamard_matrix(n).double() / n**0.5
    x = vectors(n)
    expected = x @ (dense if inverse else dense.mT)
    actual = hadamard_transform(x, inverse=inverse)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [3, 6, 172, 577])
def test_block_diagonal_where_no_matrix_exists(n):
    dense = torch.block_diag(*(hadamard_matrix(m).double() / m**0.5 for m in hadamard_blocks(n)))
    x = vectors(n)
    torch.testing.assert_close(hadamard_transform(x), x @ dense.mT, rtol=0, atol=1e-12)


def test_powers_of_two_are_sylvesters_in_natural_order():
    index = torch.arange(128)
    common = index[:, None] & index
    parity = sum((common >> bit) & 1 for bit in range(7)) % 2
    assert torch.equal(hadamard_matrix(128), (1 - 2 * parity).float())


def test_matrices_do_not_change_between_versions():
    """Saved checkpoints live in these bases: a new matrix needs a new format version."""
    orders = [12, 20, 28, 36, 44, 52, 76, 100, 148, 344, 576]
    digest = hashlib.sha256()
    for order in orders:
        digest.update(hadamard_matrix(order).to(torch.int8).numpy().tobytes())
    assert digest.hexdigest() == "4795f409e31362249c5d42aaa0e34cb7f33310da0be6da0f3e90b4646a5784fb"
    factors = {n: [m for stage in _stages(n) for m in stage if m & (m - 1)] for n in (2880, 29568)}
    assert factors == {2880: [20, 12, 12], 29568: [44, 28, 12]}


@pytest.mark.parametrize("n", [128, 384, 1152])
def test_block_is_a_kronecker_product_with_the_identity(n):
    x = vectors(n)
    expected = torch.cat([hadamard_transform(part) for part in x.split(128, dim=-1)], dim=-1)
    actual = hadamard_transform(x, block=128)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        hadamard_transform(actual, block=128, inverse=True), x, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("n", "block", "message"),
    [
        (576, 128, "block=128 does not divide the 576 channels"),
        (172, 172, "no Hadamard matrix of order 172"),
        (64, 0, "block must be at least 1"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(n, block, message):
    with pytest.raises(ValueError, match=message):
        hadamard_transform(vectors(n), block=block)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="order 172 can be built"):
        hadamard_matrix(172)
    with pytest.raises(ValueError, match="n must be at least 1"):
        hadamard_blocks(0)
    with pytest.raises(ValueError, match="must have channels"):
        hadamard_transform(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"not torch\.int64"):
        hadamard_transform(torch.arange(4))


@pytest.mark.parametrize("n", [12, 20, 31])
def test_gradient(n):
    x = vectors(n).requires_grad_()
    assert torch.autograd.gradcheck(hadamard_transform, (x,))
    g = vectors(n, rows=4)[1:]
    (grad,) = torch.autograd.grad(hadamard_transform(x), x, g)
    torch.testing.assert_close(grad, hadamard_transform(g, inverse=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_half_types_are_computed_in_float32(dtype):
    x = vectors(2880, dtype)
    y = hadamard_transform(x)
    assert y.dtype == dtype
    exact = hadamard_transform(x.double())
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(y, hadamard_transform(x.float()).to(dtype))
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_autocast_does_not_lower_the_precision():
    x = vectors(576, torch.float32)
    expected = hadamard_transform(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hadamard_transform(x), expected)


def test_matrix_cached_in_inference_mode_serves_training():
    with torch.inference_mode():
        hadamard_transform(torch.ones(2, 148))
    x = torch.ones(2, 148, requires_grad=True)
    hadamard_transform(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.ones(2, 148))


def test_the_callers_matrix_and_input_are_not_shared():
    matrix = hadamard_matrix(12)
    matrix.zero_()
    assert_hadamard(hadamard_matrix(12), 12)
    for n in (1, 12):
        x = torch.ones(1, n)
        hadamard_transform(x).zero_()
        assert torch.equal(x, torch.ones(1, n))
        torch.testing.assert_close(hadamard_transform(x).norm(), x.norm())


@pytest.mark.parametrize("shape", [(576,), (0, 576), (2, 0, 12), (2, 3, 577)])
def test_any_leading_dimensions(shape):
    x = torch.randn(shape)
    assert hadamard_transform(x).shape == shape
    flat = hadamard_transform(x.reshape(-1, shape[-1]) if x.numel() else x)
    torch.testing.assert_close(hadamard_transform(x).reshape(flat.shape), flat)


def test_strided_input():
    x = vectors(7, rows=48).mT
    torch.testing.assert_close(hadamard_transform(x), hadamard_transform(x.contiguous()))


def test_meta_tensors_give_shapes():
    assert hadamard_transform(torch.empty(2, 577, device="meta")).shape == (2, 577)


@pytest.mark.parametrize(("n", "block"), [(24, None), (31, None), (48, 16)])
def test_the_operator_that_compiled_code_calls(n, block):
    x = vectors(n).requires_grad_()
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.softtrellis.hadamard, (x, block, inverse))


def test_compiled_is_eager():
    torch.compiler.reset()
    transform = torch.compile(hadamard_transform, fullgraph=True, backend="aot_eager")
    x = vectors(31, torch.float32).requires_grad_()
    g = vectors(31, torch.float32, rows=4)[1:]
    for block in (None, 1):
        y, expected = (f(x, block=block, inverse=True) for f in (transform, hadamard_transform))
        torch.testing.assert_close(y, expected)
        (grad,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(grad, hadamard_transform(g, block=block))


@pytest.mark.parametrize("n", MODEL_DIMENSIONS)
def test_every_device_cuts_the_same_matrix(n):
    twos, paley = ([], []), ([], [])
    for i, device in enumerate(("cpu", "cuda")):
        for order in (order for stage in _stages(n, device) for order in stage):
            assert not (order & (order - 1) and twos[i])  # Paley's factors come first
            (paley if order & (order - 1) else twos)[i].append(order) if order > 1 else None
    assert paley[0] == paley[1]
    assert math.prod(twos[0]) == math.prod(twos[1])


@pytest.mark.gpu
@pytest.mark.parametrize("n", [*MODEL_DIMENSIONS[:-4], *AWKWARD_DIMENSIONS])
def test_a_gpu_gives_what_the_cpu_gives_in_float64(n):
    x = vectors(n)
    found = hadamard_transform(x.float().cuda())
    expected = hadamard_transform(x)
    assert float((found.cpu().double() - expected).norm() / expected.norm()) < 1e-6
    back = hadamard_transform(found, inverse=True)
    assert float((back.cpu().double() - x).norm() / x.norm()) < 1e-6
