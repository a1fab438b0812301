"""Packed codes to values and products in Triton: the weight never reaches memory.

The 256 positions of a tile are 32 runs of 8, whose bits lie in one window of 32 bits (48 for k = 3
and 4): its states are shifts of the window, and nothing is serial along the path. ``multiply``
keeps the decoded weights in registers; it leaves the sums over several shares of the inputs to the
caller, who adds them always in the same order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from softtrellis.codes.codebook import WHOLE_CODES
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.trellis.launch_triton import processors

RUN = tl.constexpr(8)
RUNS = tl.constexpr(32)
_MOST_SPLITS = 16


@dataclass(frozen=True)
class Launch:
    """How a product is cut into programs.

    Attributes:
        out_blocks: blocks of 16 outputs of a program, a power of two.
        in_blocks: blocks of 16 inputs that are decoded at a time, a power of two.
        warps: warps of a program.
        splits: programs that share the inputs of one block of outputs.
        dot: multiply by ``tl.dot`` on the tensor cores; otherwise, for one row only, by FMAs.
        stages: iterations whose loads Triton starts ahead.
        registers: most registers of a thread, or None for as many as the compiler likes.
    """

    out_blocks: int = 4
    in_blocks: int = 4
    warps: int = 4
    splits: int = 1
    dot: bool = True
    stages: int = 1
    registers: int | None = None


@triton.jit
def _word(codes, at, WORDS: tl.constexpr):
    """uint32 < 2**16: word ``at`` of the cyclic streams that start at ``codes``."""
    return tl.load(codes + at % WORDS).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _states(codes, tiles, L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HIGH: tl.constexpr):
    """uint32 [T, 32, 8 / V], the states of tiles int64 [T]; with HIGH, of bits above L anything."""
    WORDS: tl.constexpr = 16 * K
    run = tl.arange(0, RUNS)[None, :]
    stream = codes + tiles[:, None] * WORDS
    bit = run * (RUN * K)
    word = bit // 16
    window = (_word(stream, word, WORDS) << 16) | _word(stream, word + 1, WORDS)
    BITS: tl.constexpr = 32 if K <= 2 else 48
    if K > 2:
        window = (window.to(tl.uint64) << 16) | _word(stream, word + 2, WORDS).to(tl.uint64)
    first = (BITS - L) - (bit % 16)[:, :, None] if K % 2 == 1 else BITS - L
    step = tl.arange(0, RUN // V)[None, None, :] * (K * V)
    states = (window[:, :, None] >> (first - step).to(window.dtype)).to(tl.uint32)
    if not HIGH:
        states = states & ((1 << L) - 1)
    return states


@triton.jit
def _byte_sum(h, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 0x01010101, 0;", "=r,r", [h], tl.uint32, is_pure=True, pack=1
        )
    pairs = (h & 0x00FF00FF) + ((h >> 8) & 0x00FF00FF)
    return (pairs + (pairs >> 16)) & 0xFFFF


@triton.jit
def _half(bits):
    """float16 of uint32 whose low 16 bits are its bits."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _computed(s, CODE: tl.constexpr, FAST: tl.constexpr):
    """float16 values of states < 2**16 for the codes with V = 1; of "1mad" times 147.8..."""
    if CODE == "1mad":
        values = (_byte_sum(s * 34038481 + 76625530, FAST).to(tl.int32) - 510).to(tl.float16)
    elif CODE == "mul1":
        total = _half(_byte_sum(s * 0x83DCD12D, FAST) + 0x6400).to(tl.float32)
        # half(0x1EEE) and half(0xC931); in float32 the product and the sum are exact
        values = tl.fma(total, 0.00676727294921875, -10.3828125).to(tl.float16)
    else:
        h = s * 0xCBAC1FED if CODE == "mcg" else s * 89226354 + 64248484
        masked = (h & 0x8FFF8FFF) ^ 0x3B603B60
        values = _half(masked >> 16) + _half(masked)
    return values


@triton.jit
def _values(
    codes, table, tiles,
    CODE: tl.constexpr, L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """float16 [T, 32, 8]: the values of tiles int64 [T] along the trellis, over the factor."""
    states = _states(codes, tiles, L, K, V, CODE == "hyb" and L == 16)
    if CODE == "hyb" or CODE == "gaussian":
        row = ((states * states + states) >> 6) & 1023 if CODE == "hyb" else states
        entry = tl.load(table + row)
        values = _half(entry)
        if V == 2:
            values = tl.join(values, _half(entry >> 16))
            values = tl.reshape(values, [tiles.shape[0], RUNS, RUN])
    else:
        values = _computed(states, CODE, FAST)
    return values


@triton.jit
def _to_matrix(values, OUT: tl.constexpr, IN: tl.constexpr, ORDER: tl.constexpr):
    """[16 OUT, 16 IN] from OUT * IN tiles [OUT * IN, 32, 8]; ``from_tiles`` in registers."""
    if ORDER == "rows":
        blocks = tl.permute(tl.reshape(values, [OUT, IN, 16, 16]), [0, 2, 1, 3])
    else:
        blocks = tl.reshape(values, [OUT, IN, 8, 4, 2, 2, 2])
        blocks = tl.permute(blocks, [0, 4, 2, 1, 5, 3, 6])
    return tl.reshape(blocks, [16 * OUT, 16 * IN])


@triton.jit
def _input_of_position(ORDER: tl.constexpr):
    """int32 [32, 8]: the input, in the tile, of each position."""
    run, place = tl.arange(0, RUNS)[:, None], tl.arange(0, RUN)[None, :]
    if ORDER == "rows":
        return (run % 2) * RUN + place
    return 2 * (run % 4) + (place % 2) + 8 * ((place // 2) % 2)


@triton.jit
def _multiply(
    x, codes, table, partial, batch, out_blocks, in_blocks, share,
    CODE: tl.constexpr, ORDER: tl.constexpr, L: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """partial[split, row, output]: x [batch, inputs] times OUT blocks of outputs."""
    first_out, split = tl.program_id(0) * OUT, tl.program_id(1)
    begin = split * share
    end = tl.minimum(begin + share, in_blocks)
    out_block = tl.minimum(first_out + tl.arange(0, OUT), out_blocks - 1)
    member = tl.arange(0, IN)
    if DOT:
        rows = tl.arange(0, ROWS)
        total = tl.zeros([16 * OUT, ROWS], tl.float32)
        for block in tl.range(begin, end, IN, num_stages=STAGES):
            in_block = tl.minimum(block + member, in_blocks - 1)
            tiles = out_block[:, None].to(tl.int64) * in_blocks + in_block[None, :]
            values = _values(codes, table, tl.reshape(tiles, [OUT * IN]), CODE, L, K, V, FAST)
            channel = block * 16 + tl.arange(0, 16 * IN)
            inside = (channel < end * 16)[:, None] & (rows < batch)[None, :]
            at = rows[None, :].to(tl.int64) * (in_blocks * 16) + channel[:, None]
            part = tl.load(x + at, mask=inside, other=0.0)
            total = tl.dot(_to_matrix(values, OUT, IN, ORDER), part, total)
        output = first_out * 16 + tl.arange(0, 16 * OUT)
        inside = (output < out_blocks * 16)[:, None] & (rows < batch)[None, :]
        at = (split * batch + rows)[None, :].to(tl.int64) * (out_blocks * 16) + output[:, None]
        tl.store(partial + at, total, mask=inside)
    else:
        place = tl.reshape(_input_of_position(ORDER), [1, 1, RUNS, RUN])
        total = tl.zeros([OUT, IN, RUNS, RUN], tl.float32)
        for block in tl.range(begin, end, IN, num_stages=STAGES):
            in_block = tl.minimum(block + member, in_blocks - 1)
            tiles = out_block[:, None].to(tl.int64) * in_blocks + in_block[None, :]
            values = _values(codes, table, tl.reshape(tiles, [OUT * IN]), CODE, L, K, V, FAST)
            values = tl.reshape(values, [OUT, IN, RUNS, RUN]).to(tl.float32)
            wanted = tl.reshape(block + member, [1, IN, 1, 1])
            part = tl.load(x + wanted * 16 + place, mask=wanted < end, other=0.0)
            total = tl.fma(values, tl.broadcast_to(part.to(tl.float32), values.shape), total)
        sums = tl.sum(_to_matrix(tl.reshape(total, [OUT * IN, RUNS, RUN]), OUT, IN, ORDER), 1)
        output = first_out * 16 + tl.arange(0, 16 * OUT)
        at = split.to(tl.int64) * (out_blocks * 16) + output
        tl.store(partial + at, sums, mask=output < out_blocks * 16)


@triton.jit
def _decode(
    codes, table, weight, out_blocks, in_blocks, factor,
    CODE: tl.constexpr, ORDER: tl.constexpr, L: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    IN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """weight[output, input] of one block of 16 outputs and IN blocks of 16 inputs."""
    out_block, first_in = tl.program_id(0), tl.program_id(1) * IN
    in_block = tl.minimum(first_in + tl.arange(0, IN), in_blocks - 1)
    tiles = out_block.to(tl.int64) * in_blocks + in_block
    matrix = _to_matrix(_values(codes, table, tiles, CODE, L, K, V, FAST), 1, IN, ORDER)
    output = (out_block * 16 + tl.arange(0, 16))[:, None].to(tl.int64)
    channel = (first_in * 16 + tl.arange(0, 16 * IN))[None, :]
    at = weight + output * (in_blocks * 16) + channel
    values = (matrix.to(tl.float32) * factor).to(weight.dtype.element_ty)
    tl.store(at, values, mask=channel < in_blocks * 16)


def default_launch(batch: int, code: TrellisCode, out: int, inputs: int, n: int) -> Launch:
    """A launch for a matrix [out, inputs] on n multiprocessors; not yet measured."""
    out_blocks = 4
    programs = -(-out // (16 * out_blocks))
    splits = max(1, min(_MOST_SPLITS, -(-4 * n // programs), inputs // 256))
    return Launch(out_blocks=out_blocks, in_blocks=4, warps=4, splits=splits)


def _constants(code: TrellisCode, device: torch.device) -> dict[str, object]:
    return {
        "CODE": "gaussian" if code.name in WHOLE_CODES else code.name,
        "ORDER": code.order,
        "L": code.spec.L,
        "K": code.spec.k,
        "V": code.spec.V,
        "FAST": device.type == "cuda",
    }


def multiply(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    code: TrellisCode,
    out_features: int,
    launch: Launch | None = None,
) -> Tensor:
    """The product with a packed matrix, in shares over the inputs, over the code's factor.

    Args:
        x: float16 [B, in], in a multiple of 16; contiguous, B of at most 16.
        codes: int16 [tiles, 16 k], as ``pack`` makes them.
        table: int32, as ``decode_table`` makes it.
        code: how the matrix was written.
        out_features: rows of the matrix, a multiple of 16.
        launch: how to cut the work; by default what suits the shape.

    Returns:
        float32 [splits, B, out]; the sum over the first dimension, times the code's factor, is
        x times the transposed matrix.
    """
    batch, inputs = x.shape
    out_blocks, in_blocks = out_features // 16, inputs // 16
    launch = launch or default_launch(batch, code, out_features, inputs, processors(x.device))
    if not launch.dot and batch > 1:
        raise ValueError(f"a launch without dot takes one row, got {batch}")
    share = launch.in_blocks * -(-in_blocks // (launch.in_blocks * launch.splits))
    splits = -(-in_blocks // share)
    partial = torch.empty(splits, batch, out_features, dtype=torch.float32, device=x.device)
    _multiply[(triton.cdiv(out_blocks, launch.out_blocks), splits)](
        x,
        codes,
        table,
        partial,
        batch,
        out_blocks,
        in_blocks,
        share,
        **_constants(code, x.device),
        OUT=launch.out_blocks,
        IN=launch.in_blocks,
        ROWS=16,
        DOT=launch.dot,
        STAGES=launch.stages,
        num_warps=launch.warps,
        num_stages=launch.stages,
        maxnreg=launch.registers,
    )
    return partial


def decode(
    codes: Tensor,
    table: Tensor,
    code: TrellisCode,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    factor: float = 1.0,
) -> Tensor:
    """[out, in] of ``dtype``: the latent matrix of packed codes over the code's factor, times
    ``factor``; arguments as for ``multiply``."""
    weight = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
    blocks = in_features // 16
    together = min(16, triton.next_power_of_2(blocks))
    _decode[(out_features // 16, triton.cdiv(blocks, together))](
        codes,
        table,
        weight,
        out_features // 16,
        blocks,
        factor,
        **_constants(code, codes.device),
        IN=together,
        num_warps=4,
    )
    return weight
