"""What the Triton launches share: the shape of a step's blocks and the size of the grid."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtrellis.spec import TrellisSpec

INTERPRETER_PROCESSORS = 2


@dataclass(frozen=True)
class Launch:
    """How a sweep is cut into programs.

    Attributes:
        tiles: tiles that one program takes at a time; they share every read of the codebook.
        block: overlaps of a block, a power of two.
        warps: warps of a program.
        per_processor: programs per multiprocessor; each has its own scratch memory.
        registers: most registers of a thread, or None for as many as the compiler likes.
        choices: branches whose codewords are held in registers at once (BCJR's forward sweep).
        beta_block: overlaps of a block in BCJR's backward sweep, a power of two.
        touch: bring a step's messages into the processor's cache before it starts.
    """

    tiles: int
    block: int
    warps: int
    per_processor: int
    registers: int | None = None
    choices: int = 16
    beta_block: int = 1024
    touch: bool = False

    def threads(self, device: torch.device) -> int:
        """Threads that ask for a step's messages; 0 where nobody does."""
        return 32 * self.warps if self.touch and device.type == "cuda" else 0


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small number for Triton's interpreter on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return INTERPRETER_PROCESSORS


def programs(
    batch: int, launch: Launch, device: torch.device, bytes_per_tile: int, limit: int
) -> int:
    """Programs to start: no more than there are groups of tiles, nor than fit the memory limit."""
    groups = -(-batch // launch.tiles)
    fitting = max(1, limit // (launch.tiles * bytes_per_tile))
    return max(1, min(groups, processors(device) * launch.per_processor, fitting))


def tiles_at_once(batch: int, most: int, device: torch.device) -> int:
    """Tiles of a program, so that small batches still occupy every multiprocessor."""
    tiles = 1
    while 2 * tiles <= most and batch > tiles * processors(device):
        tiles *= 2
    return tiles


def forward_columns(spec: TrellisSpec) -> int:
    """Neighbouring overlaps with the same R predecessors, ``min(R, U)``."""
    return min(spec.num_branches, spec.num_overlaps)


def planes(codebook: Tensor) -> Tensor:
    """float32 [V, S] from the codebook [S, V]: one contiguous plane per component."""
    return codebook.to(torch.float32).T.contiguous()


def successor_planes(codebook: Tensor, spec: TrellisSpec) -> Tensor:
    """float32 [V, R, U] from the codebook [S, V]: entry [v, c, u] belongs to state u * R + c."""
    shape = (spec.num_overlaps, spec.num_branches, spec.V)
    return codebook.to(torch.float32).reshape(shape).permute(2, 1, 0).contiguous()


@triton.jit
def touch(messages, COUNT: tl.constexpr, THREADS: tl.constexpr):
    """Asks for COUNT floats, which other threads have just written, to come into the L1 cache."""
    SECTORS: tl.constexpr = COUNT // 8
    lane = tl.arange(0, THREADS)
    for i in tl.static_range((SECTORS + THREADS - 1) // THREADS):
        sector = tl.minimum(i * THREADS + lane, SECTORS - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L1 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [messages + sector * 8],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def scatter(pointers, values, FAST: tl.constexpr):
    """tl.store of floats that keeps the layout of ``values``: no exchange between threads."""
    if FAST:
        tl.inline_asm_elementwise(
            "st.global.b32 [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [pointers.to(tl.int64), values.to(tl.int32, bitcast=True)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(pointers, values)
