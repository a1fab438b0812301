"""Rotations of a few rows of activations in CUDA C++: ``trellis/cuda/rotation.cu``."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from softtrellis.transforms.hadamard import hadamard_blocks, kronecker_factors
from softtrellis.transforms.incoherence import padded_size
from softtrellis.transforms.packed_signs import packed_bytes, packed_factors
from softtrellis.trellis.launch_cuda import (
    MAX_SHARED_BYTES,
    MOST_PREPARED,
    TYPES,
    Kernel,
    Prepared,
    address,
)

Name = Literal["rotate_input", "unrotate_output"]

SOURCE, BLOCKS_SOURCE, COLUMNS_SOURCE = "rotation.cu", "rotation_blocks.cu", "rotation_columns.cu"
JOBS, POINTERS = 4, 9
"""Transforms of one launch, and pointers of each."""

CLUSTERS = (2, 4, 8)
MIN_THREADS, MAX_THREADS = 256, 512
QUAD_BLOCK, QUAD_WARPS, STRIP = 128, 4, 32


@dataclass(frozen=True)
class Launch:
    """How a transform of a b channels is cut; the kernel's comment says what the parts do.

    Attributes:
        slices: blocks of the cluster that shares a row, 2, 4 or 8. Not 1: what blocks of a cluster
            send to each other is an illegal instruction in a launch without clusters.
        threads: of a block.
        part_tiles: runs of 16 rows of A that such a cluster computes, a warp each; there are as
            many clusters as that needs.

    Raises:
        ValueError: another number of blocks.
    """

    slices: int
    threads: int
    part_tiles: int = 8

    def __post_init__(self) -> None:
        """Checks the number of blocks."""
        if self.slices not in CLUSTERS:
            raise ValueError(f"a cluster has 2, 4 or 8 blocks, not {self.slices}")


@dataclass(frozen=True)
class Transform:
    """The transform of ``a * b`` channels from ``first`` on: A (x) B, or I (x) B in blocks."""

    first: int
    order: int
    a: int
    b: int
    blocks: bool

    @property
    def tiles(self) -> int:
        """Runs of 16 rows of the channels as a matrix [a, b]."""
        return -(-self.a // 16)

    @property
    def steps(self) -> int:
        """Runs of 16 columns."""
        return -(-self.b // 16)

    def launch(self) -> Launch:
        """As many blocks as have rows or columns, and a thread for four channels."""
        groups = self.tiles if self.blocks else max(self.tiles, -(-self.b // 4))
        slices = next((n for n in CLUSTERS if n >= groups), CLUSTERS[-1])
        quads = -(-self.tiles // slices) * 16 * 4 * self.steps
        return Launch(slices, max(MIN_THREADS, min(MAX_THREADS, -(-quads // 32) * 32)))

    def group_shift(self, slices: int) -> int:
        """log2 of the groups of four columns that a block has."""
        groups = -(-self.b // 4)
        return (-(-groups // slices) - 1).bit_length()

    def shared_bytes(self, launch: Launch) -> int:
        """Dynamic shared memory of a block."""
        warps, own = launch.threads // 32, -(-self.tiles // launch.slices)
        size = self.steps * packed_bytes(self.steps) + 16 * own * 16 * 4 * (self.steps | 1)
        if not self.blocks:
            columns = 4 << self.group_shift(launch.slices)
            size += launch.part_tiles * packed_bytes(self.tiles) + 16 * columns * 4 * (
                self.tiles | 1
            )
        return size + 16 + 4 * launch.slices * warps

    def column_bytes(self, launch: Launch) -> int:
        """Of a block that takes four columns of each strip."""
        columns = 4 * self.b // STRIP
        return launch.part_tiles * packed_bytes(self.tiles) + 16 * columns * 4 * (self.tiles | 1)


@cache
def strips_of(width: int, block: int | None) -> Transform | None:
    """The transform of so many padded channels as A (x) B with Sylvester's B of 32, 64 or 128."""
    (first, *more) = transforms(width, block)
    if first.blocks or more:
        return None
    if first.b < STRIP and width.bit_count() == 1 and width >= STRIP:
        return Transform(0, width, width // STRIP, STRIP, False)
    return first if first.b in (STRIP, 2 * STRIP, 4 * STRIP) else None


def by_strips(width: int, block: int | None) -> bool:
    """Whether products may put each 32 of so many padded channels through Sylvester's transform."""
    return strips_of(width, block) is not None


@cache
def transforms(width: int, block: int | None) -> tuple[Transform, ...]:
    """What a row of so many padded channels goes through."""
    if block is not None:
        return (Transform(0, block, width // block, block, True),)
    found, first = [], 0
    for order in hadamard_blocks(width):
        a, b = (len(factor) for factor in kronecker_factors(order))
        found.append(Transform(first, order, a, b, False))
        first += order
    return tuple(found)


@cache
def runs(width: int, block: int | None) -> bool:
    """Whether a block's shared memory holds its part of a row of so many padded channels.

    It does up to some 200,000 channels, and for blocks of up to 1024.
    """
    return all(t.shared_bytes(t.launch()) <= MAX_SHARED_BYTES for t in transforms(width, block))


def rotate_input(
    x: Tensor,
    signs: Tensor,
    scales: Tensor | None,
    *,
    multiple: int = 16,
    block: int | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """``rotation_triton.rotate_input``, for widths that ``runs`` names and x of float16, bfloat16
    or float32.

    It may begin while the kernel before it ends, and lets the next one begin when that has ended.

    Args:
        x, signs, scales, multiple, block: as there.
        launch: how to cut it, for measurements.
    """
    batch, features = x.shape
    width = padded_size(features, multiple)
    target = x.new_empty(batch, width, dtype=torch.float16)
    norms = x.new_empty(batch, dtype=torch.float32)
    source, scaling = x.data_ptr(), address(scales)
    by_four = (source | scaling) % 16 == 0
    rows = Rows(batch, features, width, width, block, 0, 1.0, x.dtype, None, by_four, False)
    outer = source, target.data_ptr(), norms.data_ptr()
    inner = signs.data_ptr(), scaling, 0, 0
    launches = _prepared("rotate_input", (rows,), launch, False, x.device)
    _start(launches, x.get_device(), [(outer, inner)])
    return target, norms


def unrotate_output(
    partial: Tensor,
    norms: Tensor,
    signs: Tensor,
    scale: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    *,
    features: int,
    factor: float,
    dtype: torch.dtype,
    block: int | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """``rotation_triton.unrotate_output``, for widths that ``runs`` names and results of float16,
    bfloat16 or float32; see ``rotate_input``.
    """
    (y,) = unrotate_outputs(
        [partial], norms, [(signs, scale, scales, bias, features)],
        factor=factor, dtype=dtype, block=block, launch=launch,
    )  # fmt: skip
    return y


def unrotate_outputs(
    partials: Sequence[Tensor],
    norms: Tensor,
    layers: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]],
    *,
    factor: float,
    dtype: torch.dtype,
    block: int | None = None,
    launch: Launch | None = None,
    by_strips: bool = False,
    rows: Sequence[int] | None = None,
) -> list[Tensor]:
    """``unrotate_output`` of several layers of the same inputs, up to four in one launch.

    Args:
        partials, norms, factor, dtype, block, launch: as there; a product of each layer.
        layers: signs, scale, scales, bias and features of each.
        by_strips: each 32 channels of the partials have been through Sylvester's transform; only
            for widths that ``by_strips`` names.
        rows: the shape of the results without their channels, [B] if None.
    """
    found, shapes, pointers = [], [], []
    for partial, (signs, scale, scales, bias, features) in zip(partials, layers, strict=True):
        splits, batch, width = partial.shape
        shape = (batch,) if rows is None else rows
        y = partial.new_empty(*shape, features, dtype=dtype)
        source, scaling, shift = partial.data_ptr(), address(scales), address(bias)
        by_four = (source | scaling) % 16 == 0
        in_quads = by_four and shift % 16 == 0 and features % 4 == 0 and block == QUAD_BLOCK
        shapes.append(
            Rows(
                batch, features, width, partial.stride(1), block, splits, factor,
                dtype, None if bias is None else bias.dtype, by_four, in_quads,
            )
        )  # fmt: skip
        outer = source, y.data_ptr(), norms.data_ptr()
        pointers.append((outer, (signs.data_ptr(), scaling, shift, scale.data_ptr())))
        found.append(y)
    launches = _prepared("unrotate_output", tuple(shapes), launch, by_strips, norms.device)
    _start(launches, norms.get_device(), pointers)
    return found


class Rows(NamedTuple):
    """All of rows to rotate that their launch depends on, as the kernel's comment describes them.

    Attributes:
        batch, features, width, stride, block, splits, factor: as there.
        dtype: of the activations.
        bias: its dtype.
        by_four: whether four channels of the source, and scales, can be read at once.
        in_quads: whether ``rotation_blocks.cu`` takes them: it reads and writes four at once.
    """

    batch: int
    features: int
    width: int
    stride: int
    block: int | None
    splits: int
    factor: float
    dtype: torch.dtype
    bias: torch.dtype | None
    by_four: bool
    in_quads: bool

    def numbers(self, into: bool, transform: Transform, cut: Launch, first_block: int) -> list[int]:
        """Of the kernel, for one of its transforms, into a packed product's basis or out of it."""
        if self.dtype not in TYPES:
            names = ", ".join(str(dtype) for dtype in TYPES)
            raise ValueError(f"activations must be one of {names}, got {self.dtype}")
        row = self.features if into else self.stride
        quads = all(n % 4 == 0 for n in (row, transform.first, transform.b))
        return [
            *(self.batch, self.features, self.stride),
            *(transform.first, transform.a, transform.b),
            *(self.splits, cut.slices, _parts(transform, cut), cut.part_tiles),
            transform.group_shift(cut.slices),
            *(TYPES[self.dtype], 0 if self.bias is None else TYPES[self.bias]),
            self.by_four and quads,
            *struct.unpack("i", struct.pack("f", self.factor / sqrt(transform.order))),
            *(first_block, 0),
        ]


_Pointers = tuple[tuple[int, int, int], tuple[int, int, int, int]]
"""Of rows: source, target and norms; signs, scales, bias and scale."""


def _start(launches: Sequence[_Launch], device: int, rows: Sequence[_Pointers]) -> None:
    """Starts launches on the tensors of the rows that they were prepared for."""
    for prepared, jobs in launches:
        pointers = []
        for i, (left, right) in jobs:
            outer, inner = rows[i]
            pointers.append((*outer, address(left), right.data_ptr(), *inner))
        prepared(device, pointers + pointers[-1:] * (JOBS - len(jobs)))


def _parts(transform: Transform, cut: Launch) -> int:
    """Clusters of a row."""
    return 1 if transform.blocks else -(-transform.tiles // cut.part_tiles)


_Job = tuple[int, Rows, Transform]
"""Rows, their place among all rows of a call, and one of their transforms."""
_Factors = tuple[Tensor | None, Tensor]
_Launch = tuple[Prepared, list[tuple[int, _Factors]]]
"""A launch and, of each of its jobs, the place of its rows and the transform's factors."""


@lru_cache(maxsize=MOST_PREPARED)
def _prepared(
    name: Name,
    shapes: tuple[Rows, ...],
    cut: Launch | None,
    by_strips: bool,
    device: torch.device,
) -> list[_Launch]:
    """The launches that rotate these rows."""
    rows = list(enumerate(shapes))
    if by_strips:
        found = [(i, r, t) for i, r in rows if (t := strips_of(r.width, r.block))]
        return [_columns(jobs, device) for jobs in _launches(found)]
    found = [(i, r, t) for i, r in rows for t in transforms(r.width, r.block)]
    if cut is None and all(r.in_quads for r in shapes):
        return [_quads(jobs, device) for jobs in _launches(found)]
    return [_clusters(name, jobs, cut, device) for jobs in _launches(found)]


def _launches(jobs: Sequence[_Job]) -> Iterator[Sequence[_Job]]:
    """As many jobs at a time as a launch takes."""
    return (jobs[i : i + JOBS] for i in range(0, len(jobs), JOBS))


def _clusters(
    name: Name, jobs: Sequence[_Job], cut: Launch | None, device: torch.device
) -> _Launch:
    """All transforms of rows, by clusters of blocks."""
    cut = cut or max((t.launch() for _, _, t in jobs), key=lambda c: (c.slices, c.threads))
    together = name == "rotate_input" or any(not t.blocks for _, _, t in jobs)
    grids = [r.batch * cut.slices * _parts(t, cut) for _, r, t in jobs]
    shared, cluster = max(t.shared_bytes(cut) for _, _, t in jobs), cut.slices if together else 1
    kernel = Kernel(SOURCE, name, cut.threads)
    return _launch(kernel, jobs, [cut] * len(jobs), grids, device, shared, cluster)


def _quads(jobs: Sequence[_Job], device: torch.device) -> _Launch:
    """Out of blocks of 128 channels, a warp for each of them."""
    kernel = Kernel(BLOCKS_SOURCE, "unrotate_blocks", 32 * QUAD_WARPS)
    grids = [-(-r.batch * t.a // QUAD_WARPS) for _, r, t in jobs]
    return _launch(kernel, jobs, [t.launch() for _, _, t in jobs], grids, device)


def _columns(jobs: Sequence[_Job], device: torch.device) -> _Launch:
    """Of strips that products transformed: 8 blocks, times as many as rows of A need."""
    cuts = [t.launch() for _, _, t in jobs]
    grids = [
        r.batch * STRIP // 4 * _parts(t, cut) for (_, r, t), cut in zip(jobs, cuts, strict=True)
    ]
    rows = max(-(-t.a // 32) * 32 for _, _, t in jobs)
    threads = min(MAX_THREADS, max(MIN_THREADS, rows))
    shared = max(t.column_bytes(cut) for (_, _, t), cut in zip(jobs, cuts, strict=True))
    kernel = Kernel(COLUMNS_SOURCE, "unrotate_columns", threads)
    return _launch(kernel, jobs, cuts, grids, device, shared)


def _launch(
    kernel: Kernel,
    jobs: Sequence[_Job],
    cuts: Sequence[Launch],
    grids: Sequence[int],
    device: torch.device,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> _Launch:
    """One launch, of so many blocks a job; those that are not there begin after all blocks."""
    into = kernel.name == "rotate_input"
    numbers, factors, blocks = [], [], 0
    for (i, rows, transform), cut, grid in zip(jobs, cuts, grids, strict=True):
        numbers.append(rows.numbers(into, transform, cut, blocks))
        a = None if transform.blocks else transform.a
        factors.append((i, packed_factors(transform.order, a, not into, device)))
        blocks += grid
    missing = [[*numbers[-1][:-2], blocks, 0]] * (JOBS - len(jobs))
    structures = [(POINTERS, part) for part in (*numbers, *missing)]
    prepared = Prepared(kernel, blocks, shared_bytes, structures, cluster=cluster, overlap=True)
    return prepared, factors
