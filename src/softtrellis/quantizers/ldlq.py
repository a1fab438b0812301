"""LDLQ: quantize 16 columns, or tiles, at a time and feed the error forward through Hessians."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16

EncodeColumns = Callable[[Tensor], Tensor]
"""Quantizes [out, 16] columns: returns their reproduction [out, 16]."""

Tiles = list[tuple[Tensor, Tensor]]
"""Of every matrix the rows and the columns [n] of some tiles of 16x16 weights, in tiles."""
EncodeTiles = Callable[[Tensor, Tiles], Tensor]
"""Quantizes these tiles' [16 n, 16] weights, matrix by matrix: returns their reproduction."""

_MAX_DAMPING_STEPS = 12
_FLOAT64_SIZE = 8192  # larger Hessians are factorised in float32, which takes half the memory


@dataclass(frozen=True, eq=False)
class Feedback:
    """Block LDL factor of a damped Hessian.

    Attributes:
        factor: [in, in], unit block lower triangular L with H = L D L^T.
        damping: what was added to the diagonal, over its mean.
    """

    factor: Tensor
    damping: float


def damped_cholesky(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Cholesky factor of a Hessian with something added to its diagonal.

    Channels that never fire (zero diagonal) get the mean diagonal, which leaves the others as they
    are. If the factorisation fails the damping grows tenfold until it succeeds.

    Args:
        hessian: [n, n], symmetric positive semi-definite.
        damping: added to the diagonal, as a share of its mean; > 0.

    Returns:
        Lower triangular [n, n], float64 up to n = 8192 and float32 above, and the damping.

    Raises:
        ValueError: a Hessian that is not finite, or that no damping makes positive definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian holds NaN or infinity; check the calibration activations")
    h = hessian.to(torch.float64 if len(hessian) <= _FLOAT64_SIZE else torch.float32, copy=True)
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        raise ValueError("the Hessian is zero: these inputs never fire on the calibration text")
    diagonal[diagonal <= 0] = mean
    added = 0.0
    for _ in range(_MAX_DAMPING_STEPS):
        diagonal.add_((damping - added) * mean)
        added = damping
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0:
            return lower, added
        damping *= 10.0
    raise ValueError("the Hessian is not positive semi-definite, whatever the damping")


def block_ldl(hessian: Tensor, damping: float) -> Feedback:
    """Block LDL decomposition by way of Cholesky (QuIP#, arXiv 2402.04396, section 4.1).

    Args:
        hessian: [in, in], symmetric positive semi-definite, in a multiple of 16.
        damping: see ``damped_cholesky``.

    Raises:
        ValueError: as ``damped_cholesky``.
    """
    size = hessian.shape[0]
    if size % BLOCK:
        raise ValueError(f"the Hessian's size must be a multiple of {BLOCK}, got {size}")
    lower, added = damped_cholesky(hessian, damping)
    corners = lower.reshape(size // BLOCK, BLOCK, size // BLOCK, BLOCK)
    corners = corners.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    identity = torch.eye(BLOCK, dtype=lower.dtype, device=lower.device).expand_as(corners)
    inverse = torch.linalg.solve_triangular(corners, identity, upper=False)
    columns = lower.reshape(size, size // BLOCK, BLOCK).transpose(0, 1)
    factor = torch.bmm(columns, inverse).transpose(0, 1).reshape(size, size)
    return Feedback(factor.to(hessian.dtype), added)


def ldlq(
    weight: Tensor,
    feedback: Feedback,
    encode: EncodeColumns,
    *,
    on_block: Callable[[], None] | None = None,
) -> Tensor:
    """Quantizes a weight matrix with error feedback (QTIP, section 4; QuIP#, section 4.1).

    Blocks of 16 input columns are taken from the last to the first; each is quantized after the
    errors already made, weighted by the factor, were added to it. The result minimises
    tr(E H E^T) greedily, with E = weight - result.

    Args:
        weight: [out, in].
        feedback: ``block_ldl`` of the inputs' Hessian.
        encode: quantizes [out, 16].
        on_block: called after each block, for progress.

    Returns:
        [out, in], the reproduction.
    """
    result = torch.empty_like(weight)
    error = torch.zeros_like(weight)
    for first in reversed(range(0, weight.shape[1], BLOCK)):
        here, later = slice(first, first + BLOCK), slice(first + BLOCK, None)
        target = weight[:, here] + error[:, later] @ feedback.factor[later, here]
        result[:, here] = encode(target)
        error[:, here] = weight[:, here] - result[:, here]
        if on_block is not None:
            on_block()
    return result


def two_sided_ldlq(
    weights: Sequence[Tensor],
    inputs: Feedback,
    outputs: Sequence[Feedback],
    encode: EncodeTiles,
) -> None:
    """Quantizes matrices of the same inputs with error feedback along inputs and outputs.

    Minimises tr(G E H E^T) greedily, with H of the inputs and a G of each matrix' outputs: with
    H = L D L^T and G = M C M^T that is the size of M^T E L, weighted by C and D, whose tile (i, j)
    is E_ij and what tiles below and to the right of it give (YAQA, arXiv 2505.22988, section 4).
    So tiles are taken from the last row and column to the first; those of an antidiagonal, of all
    matrices, are encoded together. With G the identity it is ``ldlq``.

    Args:
        weights: [out, in] each, in multiples of 16.
        inputs: ``block_ldl`` of H.
        outputs: ``block_ldl`` of every G.
        encode: quantizes tiles; each is asked for once.
    """
    sides = [
        _Sides(weight, inputs.factor, g.factor) for weight, g in zip(weights, outputs, strict=True)
    ]
    for wave in reversed(range(max(side.rows + side.columns for side in sides) - 1)):
        tiles = [side.antidiagonal(wave) for side in sides]
        targets = [side.targets(*place) for side, place in zip(sides, tiles, strict=True)]
        found = encode(torch.cat(targets), tiles).split([len(target) for target in targets])
        for side, place, values in zip(sides, tiles, found, strict=True):
            side.add(*place, values)


class _Sides:
    """One matrix of ``two_sided_ldlq``: what its errors so far ask of the tiles that are left."""

    def __init__(self, weight: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        self.rows, self.columns = (size // BLOCK for size in weight.shape)
        self._weight = _tiled(weight)
        self._along = torch.zeros_like(self._weight)  # (E L)_ij, complete but for E_ij
        self._across = torch.zeros_like(self._weight)  # sum over k > i of (M_ki)^T (E L)_kj
        self._inputs = _tiled(inputs)
        self._outputs = _tiled(outputs).transpose(-1, -2)

    def antidiagonal(self, wave: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of its tiles, on the weight's device; maybe none."""
        first = max(0, wave - self.columns + 1)
        last = max(first, min(self.rows, wave + 1))
        i = torch.arange(first, last, device=self._weight.device)
        return i, wave - i

    def targets(self, i: Tensor, j: Tensor) -> Tensor:
        """[16 n, 16]."""
        found = self._weight[i, j] + self._along[i, j] + self._across[i, j]
        return found.reshape(-1, BLOCK)

    def add(self, i: Tensor, j: Tensor, values: Tensor) -> None:
        """Takes over what the tiles became; rows and columns of them are all different."""
        error = (self._weight[i, j] - values.reshape(-1, BLOCK, BLOCK)).unsqueeze(1)
        self._along[i] += error @ self._inputs[j]  # which is 0 right of column j
        whole = self._along[i, j].unsqueeze(1)
        self._across[:, j] += (self._outputs[i] @ whole).transpose(0, 1)


def _tiled(matrix: Tensor) -> Tensor:
    """[out, in] as tiles [out / 16, in / 16, 16, 16]."""
    rows, columns = (size // BLOCK for size in matrix.shape)
    return matrix.reshape(rows, BLOCK, columns, BLOCK).transpose(1, 2).contiguous()


def proxy_loss(weight: Tensor, reproduction: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T): the share of the output's energy that is lost."""
    error = weight - reproduction
    lost = ((error @ hessian) * error).sum(dtype=torch.float64)
    energy = ((weight @ hessian) * weight).sum(dtype=torch.float64)
    return float(lost / energy.clamp_min(1e-300))
