"""Hadamard matrices of many orders, and a fast orthonormal transform for every dimension.

Constructions: Sylvester (powers of two) and Paley's two over finite fields (R. E. A. C. Paley,
"On orthogonal matrices", J. Math. Phys. 12, 1933): order q + 1 for a prime power q = 3 mod 4 and
order 2 (q + 1) for a prime power q = 1 mod 4; Kronecker products of them give the rest.

The matrix of an order is part of the checkpoint format, as saved weights live in its basis:

    H_n = P_d1 (x) P_d2 (x) ... (x) S_(2^a)        n = d1 d2 ... 2^a,   d1 >= d2 >= ...

with Paley matrices P, the Sylvester matrix S, and the d of the smallest sum. How the product is
cut into matmuls (`_stages`) only changes the speed.
"""

import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Signs = npt.NDArray[np.int8]
Integers = npt.NDArray[np.int64]

MAX_PALEY_ORDER = 2048
"""Largest Paley factor used; beyond it, the dense matmul would cost more than it is worth."""

_WIDEST = {"cpu": 64, "cuda": 128}  # largest matmul factor built up from powers of two


# ---------------------------------------------------------------------- finite fields


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e for a prime p, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    e = 0
    while q % p == 0:
        q, e = q // p, e + 1
    return (p, e) if q == 1 else None


def _divides(divisor: tuple[int, ...], dividend: tuple[int, ...], p: int) -> bool:
    """Whether a monic polynomial divides another over GF(p); coefficients, constant first."""
    rest, degree = list(dividend), len(divisor) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        lead = rest[top]
        for i, coefficient in enumerate(divisor):
            rest[top - degree + i] = (rest[top - degree + i] - lead * coefficient) % p
    return not any(rest)


def _irreducible(p: int, e: int) -> tuple[int, ...]:
    """First monic irreducible polynomial of degree e over GF(p), highest coefficients first."""

    def monic(degree: int) -> list[tuple[int, ...]]:
        return [(*c[::-1], 1) for c in itertools.product(range(p), repeat=degree)]

    divisors = [g for degree in range(1, e // 2 + 1) for g in monic(degree)]
    return next(f for f in monic(e) if not any(_divides(g, f, p) for g in divisors))


def _residue_matrix(p: int, e: int) -> Signs:
    """Quadratic character of a_i - a_j over GF(p^e): int8 [q, q] of -1, 0, 1.

    Element i is the polynomial whose coefficients are the base-p digits of i, constant first.
    """
    q = p**e
    digits: Integers = np.arange(q)[:, None] // p ** np.arange(e) % p
    squares = np.zeros((q, 2 * e - 1), dtype=np.int64)
    for i, j in itertools.product(range(e), repeat=2):
        squares[:, i + j] += digits[:, i] * digits[:, j]
    modulus = np.array(_irreducible(p, e), dtype=np.int64)
    for top in range(2 * e - 2, e - 1, -1):
        squares[:, top - e : top + 1] -= squares[:, top, None] % p * modulus
    character = np.full(q, -1, dtype=np.int8)
    character[squares[:, :e] % p @ p ** np.arange(e)] = 1
    character[0] = 0
    differences = np.zeros((q, q), dtype=np.int64)
    for i in range(e):
        differences += (digits[:, None, i] - digits[None, :, i]) % p * p**i
    return character[differences]


# ---------------------------------------------------------------------- matrices


def _paley_field(order: int) -> tuple[int, int, int] | None:
    """(construction 1 or 2, p, e) of the Paley matrix of this order, or None."""
    for construction, q in ((1, order - 1), (2, order // 2 - 1)):
        field = _prime_power(q) if order % 4 == 0 and q % 4 == (3, 1)[construction - 1] else None
        if field is not None:
            return construction, *field
    return None


_SYLVESTER = np.array([[1, 1], [1, -1]], dtype=np.int8)
_DIAGONAL = np.array([[1, -1], [-1, -1]], dtype=np.int8)  # stands for 0 in Paley's second


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


@lru_cache(maxsize=64)
def _base_matrix(order: int) -> Signs:
    """The Sylvester or Paley matrix of an order: int8 [order, order], read-only."""
    if _is_power_of_two(order):
        sylvester: list[Signs] = [_SYLVESTER] * (order.bit_length() - 1)
        signs: Signs = reduce(np.kron, sylvester, np.ones((1, 1), dtype=np.int8))
    else:
        field = _paley_field(order)
        assert field is not None
        construction, p, e = field
        size = p**e + 1
        conference = np.ones((size, size), dtype=np.int8)
        conference[0, 0] = 0
        conference[1:, 1:] = _residue_matrix(p, e)
        identity = np.eye(size, dtype=np.int8)
        if construction == 1:
            conference[1:, 0] = -1
            signs = conference + identity
        else:
            signs = np.kron(conference, _SYLVESTER) + np.kron(identity, _DIAGONAL)
    matrix = signs.astype(np.int8)
    matrix.setflags(write=False)
    return matrix


@cache
def _paley_factors(n: int) -> tuple[int, ...] | None:
    """Paley orders, descending, whose product times a power of two is n; None if there are none.

    Of several ways the one with the smallest sum, then the fewest factors, is taken.
    """
    if _is_power_of_two(n):
        return ()
    if n % 4:
        return None
    found = []
    for order in range(12, min(n, MAX_PALEY_ORDER) + 1, 4):
        if n % order or _is_power_of_two(order) or _paley_field(order) is None:
            continue
        rest = _paley_factors(n // order)
        if rest is not None:
            found.append(tuple(sorted((order, *rest), reverse=True)))
    return min(found, key=lambda orders: (sum(orders), len(orders), orders), default=None)


@cache
def _stages(n: int, device_type: str = "cpu") -> tuple[tuple[int, ...], ...]:
    """Base orders of each matmul of the transform; their Kronecker product in order is H_n.

    Powers of two are dealt to as few Sylvester matmuls as `_WIDEST` allows, in even shares; the
    last Paley matmul takes some too while it is small. H_n is the same for every device.
    """
    paley, widest = _paley_factors(n), _WIDEST.get(device_type, _WIDEST["cpu"])
    assert paley is not None
    twos = (n // math.prod(paley)).bit_length() - 1
    for sylvester in itertools.count(0 if paley else 1):
        bases = [*paley[-1:], *[1] * sylvester]
        sizes = bases.copy()
        for _ in range(twos):
            sizes[sizes.index(min(sizes))] *= 2
        if all(size <= max(widest, base) for size, base in zip(sizes, bases, strict=True)):
            break
    stages: list[tuple[int, ...]] = [(order,) for order in paley[:-1]]
    stages += [(base, size // base) for base, size in zip(bases, sizes, strict=True)]
    return tuple(stages)


def _check_size(n: int, name: str = "n") -> None:
    if n < 1:
        raise ValueError(f"{name} must be at least 1, not {n}")


@cache
def _blocks(n: int) -> tuple[int, ...]:
    _check_size(n)
    blocks = []
    while n:
        order = n
        while _paley_factors(order) is None:
            order -= (order % 4 or 4) if order > 4 else 1
        blocks.append(order)
        n -= order
    return tuple(blocks)


def hadamard_blocks(n: int) -> tuple[int, ...]:
    """Orders of the diagonal blocks that transform n channels; one order wherever possible.

    Args:
        n: number of channels, at least 1.

    Returns:
        Orders whose sum is n. A single one where `hadamard_matrix(n)` exists; otherwise the
        largest multiple of 4 that has a matrix comes first, and so on with what is left.

    Raises:
        ValueError: n is smaller than 1.
    """
    return _blocks(n)


def _check_order(n: int, name: str) -> None:
    _check_size(n, name)
    if len(hadamard_blocks(n)) > 1:
        raise ValueError(
            f"no Hadamard matrix of order {n} can be built (Sylvester and Paley factors up to "
            f"{MAX_PALEY_ORDER}); hadamard_blocks({n}) = {hadamard_blocks(n)} lists orders that can"
        )


def hadamard_matrix(n: int) -> Tensor:
    """Hadamard matrix H with H H^T = n I.

    Args:
        n: order; 1, 2, or a multiple of 4 with a Sylvester or Paley construction (Paley, 1933).

    Returns:
        float32 [n, n] of +-1, the caller's own copy.

    Raises:
        ValueError: no construction is known for n.
    """
    _check_order(n, "n")
    factors = [_base_matrix(order) for stage in _stages(n) for order in stage]
    return torch.from_numpy(reduce(np.kron, factors).astype(np.float32))


@cache
def kronecker_factors(n: int) -> tuple[Tensor, Tensor]:
    """int8 [a, a] and [b, b] of +-1, about square, with H_n = left (x) right.

    Shared: never change them. H_n x of a vector x, seen as a matrix [a, b], is left x right^T.
    b costs more than a, as kernels pad it to a power of two.

    Raises:
        ValueError: no construction is known for n.
    """
    _check_order(n, "n")
    paley = _paley_factors(n) or ()
    orders = [*paley, *[2] * ((n // math.prod(paley)).bit_length() - 1)]

    def cost(cut: int) -> tuple[int, int]:
        left, right = math.prod(orders[:cut]), math.prod(orders[cut:])
        return left + 2 * max(16, 1 << (right - 1).bit_length()), -cut

    cut = min(range(len(orders) + 1), key=cost)

    def product(part: list[int]) -> Tensor:
        signs = reduce(np.kron, map(_base_matrix, part), np.ones((1, 1), dtype=np.int8))
        with torch.inference_mode(False):
            return torch.from_numpy(signs.astype(np.int8))

    return product(orders[:cut]), product(orders[cut:])


# ---------------------------------------------------------------------- transform


@lru_cache(maxsize=256)
def _stage_matrix(orders: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal Kronecker product of base matrices: [f, f]. Shared: never handed out."""
    signs = reduce(np.kron, [_base_matrix(order) for order in orders])
    with torch.inference_mode(False):
        return torch.tensor(signs / math.sqrt(len(signs)), dtype=dtype, device=device)


def _stage_matrices(n: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [_stage_matrix(orders, dtype, device) for orders in _stages(n, device.type)]


def _transform(x: Tensor, inverse: bool) -> Tensor:
    """H x (or H^T x) over the last dimension, for an order that has a matrix: [..., n]."""
    y, right = x, x.shape[-1]
    for matrix in _stage_matrices(right, x.dtype, x.device):
        size = matrix.shape[0]
        y = y.reshape(x.numel() // right, size, right // size)
        right //= size
        factor = matrix.mT if inverse else matrix
        if y.is_cuda and right > 1:
            y = torch.bmm(factor.expand(len(y), size, size), y)
        else:  # a batch of small matmuls would synchronise a CPU's threads for each of them
            y = torch.matmul(y.mT.reshape(-1, size), factor.mT).reshape(-1, right, size).mT
    return y.reshape(x.shape)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _hadamard(x: Tensor, block: int | None, inverse: bool) -> Tensor:
    """``hadamard_transform`` of a tensor that is known to fit."""
    n = x.shape[-1]
    orders = hadamard_blocks(n)
    work = x if x.dtype == torch.float64 else x.to(torch.float32)
    if block is not None:
        _check_order(block, "block")
        if n % block:
            raise ValueError(f"block={block} does not divide the {n} channels; pad them first")
        work, orders = work.reshape(*x.shape[:-1], n // block, block), (block,)
    with _without_autocast(x.device):
        if len(orders) == 1:
            y = _transform(work, inverse)
        else:
            parts = torch.split(work, list(orders), dim=-1)
            y = torch.cat([_transform(part, inverse) for part in parts], dim=-1)
    return y.reshape(x.shape).to(x.dtype)


torch.library.define(
    "softtrellis::hadamard",
    "(Tensor x, int? block, bool inverse) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("softtrellis::hadamard", "default")
def _hadamard_op(x: Tensor, block: int | None, inverse: bool) -> Tensor:
    return _hadamard(x, block, inverse).contiguous()


def _hadamard_shape(x: Tensor, block: int | None, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block, ctx.inverse = inputs


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.softtrellis.hadamard(grad, ctx.block, not ctx.inverse), None, None


torch.library.register_fake("softtrellis::hadamard", _hadamard_shape)
torch.library.register_autograd(
    "softtrellis::hadamard", _differentiate, setup_context=_save_for_backward
)


def hadamard_transform(x: Tensor, *, block: int | None = None, inverse: bool = False) -> Tensor:
    """Orthonormal Hadamard transform of the last dimension, for any size.

    Differentiable; the cost is that of a few small matmuls, not of one [n, n] matmul. Where n has
    no Hadamard matrix the transform is block diagonal with the orders of `hadamard_blocks(n)`.

    The factors stay on x's device after their first use. `torch.compile` sees one operator.

    Args:
        x: [..., n], any floating dtype. float64 is computed in float64, all else in float32
            (also under autocast); on a GPU the caller's
            `torch.backends.cuda.matmul.allow_tf32`, off by default, lowers that.
        block: transform each run of `block` channels with H_block, i.e. by I (x) H_block.
        inverse: apply the transpose, which undoes the transform.

    Returns:
        [..., n] of x's dtype: y = H x / sqrt(n) for each vector x.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x has no channels, or block does not divide n or has no Hadamard matrix.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, not {x.dtype}; convert it first")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have channels in its last dimension, but is {list(x.shape)}")
    if torch.compiler.is_compiling():  # cannot trace how the matrices are made and kept
        y: Tensor = torch.ops.softtrellis.hadamard(x, block, inverse)
        return y
    return _hadamard(x, block, inverse)
