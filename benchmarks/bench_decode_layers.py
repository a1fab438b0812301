"""How a packed layer is best launched, and when each of its kernels does what, on one GPU.

    python benchmarks/bench_decode_layers.py [rank | timeline | all]

``rank`` times whole layers at batch 1 as ``bench_decode.py`` does, as they are and in other ways;
each is checked first, and a wrong one is named and not timed. The other ways are edits of the
kernels' sources, or other sizes of their launches. ``timeline`` puts clocks into the kernels: when,
in microseconds after the first block of the layer's first kernel was let go by the kernel before,
the first, the average and the last block came to each point; the mean of REPLAYS.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count, product
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bench_decode import (
    HYB,
    MUL1,
    captured,
    layer_time,
    many_codes,
    random_layer,
    relative,
)  # fmt: skip

from softtrellis.modules import decode_cuda
from softtrellis.modules.decode_cuda import ROTATING, VARIANTS, Variant
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.transforms import rotation_cuda
from softtrellis.transforms.rotation_cuda import Launch, Transform
from softtrellis.trellis import launch_cuda
from softtrellis.trellis.launch_cuda import Kernel

SHAPES = (
    (4096, 11008), (2048, 8192), (28672, 4096), (6144, 4096), (4096, 14336), (4096, 4096),
    (576, 1536),
)  # fmt: skip
REPLAYS = 100
BLOCKS = 256  # most of a grid
KERNELS = Path(launch_cuda.__file__).parent / "cuda"

Edit = tuple[str, str]

EARLY_IN = "    if (INPUT) let_the_next_kernel_begin();\n"
LATE_OUT = "    if (!INPUT) let_the_next_kernel_begin();\n"
LATE: list[Edit] = [(EARLY_IN, ""), (LATE_OUT, LATE_OUT.replace("if (!INPUT) ", ""))]
EARLY: list[Edit] = [(EARLY_IN, EARLY_IN.replace("if (INPUT) ", "")), (LATE_OUT, "")]
BEGIN_COLUMNS = "    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;\n"
LATE_COLUMNS = "    let_the_next_kernel_begin();\n"
EARLY_COLUMNS = [(LATE_COLUMNS, ""), (BEGIN_COLUMNS, LATE_COLUMNS + BEGIN_COLUMNS)]
BOUNDS = "__launch_bounds__(512, 2) unrotate_output"
TWICE: list[Edit] = [("AT_ONCE = 1", "AT_ONCE = 2"), (BOUNDS, "__maxnreg__(96) unrotate_output")]
ROOMY: list[Edit] = [(BOUNDS, "__maxnreg__(80) unrotate_output")]
MORE_KERNELS = [(12, 3, 104), (8, 0, 128), (12, 0, 104)]
"""Warps, stages (0: codes straight into registers), registers of a thread."""


@dataclass(frozen=True)
class Way:
    """Of launching a layer.

    Attributes:
        name: for the table.
        decode, rotation, columns, blocks: sources in place of those in the package.
        apart: the product never rotates its row itself.
        strips: whether products begin the outputs' rotation.
        quads: whether blocks of 128 channels of the outputs are a warp's work.
        threads: of a rotation's block, at most.
        part_tiles: see ``Launch``.
        kernels: warps and stages of other kernels, of ``MORE_KERNELS``.
    """

    name: str
    decode: str = "decode.cu"
    rotation: str = "rotation.cu"
    columns: str = "rotation_columns.cu"
    blocks: str = "rotation_blocks.cu"
    apart: bool = False
    strips: bool = True
    quads: bool = True
    threads: int = 512
    part_tiles: int = 8
    kernels: tuple[int, int] | None = None

    def cut(self, usual: Launch) -> Launch:
        return replace(usual, threads=min(usual.threads, self.threads), part_tiles=self.part_tiles)

    def moved(self, usual: Variant) -> Variant:
        name, threads, stages = usual.kernel.name, usual.kernel.threads, usual.stages
        if self.kernels and usual.inputs != "global":
            warps, stages = self.kernels
            name, threads = f"{name}_{warps}_{stages}", 32 * warps
        return replace(usual, kernel=Kernel(self.decode, name, threads), stages=stages)

    @contextmanager
    def used(self) -> Iterator[None]:
        usual = Transform.launch
        moved = {key: [self.moved(v) for v in variants] for key, variants in VARIANTS.items()}
        turning = {key: self.moved(v) for key, v in ROTATING.items()}
        with ExitStack() as stack:
            for change in (
                patch.dict(decode_cuda.VARIANTS, moved),
                patch.dict(decode_cuda.ROTATING, turning),
                patch.object(rotation_cuda, "SOURCE", self.rotation),
                patch.object(rotation_cuda, "COLUMNS_SOURCE", self.columns),
                patch.object(rotation_cuda, "BLOCKS_SOURCE", self.blocks),
                patch.object(Transform, "launch", lambda transform: self.cut(usual(transform))),
            ):
                stack.enter_context(change)
            if not self.strips:
                stack.enter_context(patch.object(rotation_cuda, "by_strips", lambda *_: False))
            if not self.quads:
                no = patch.object(rotation_cuda.Rotation, "in_quads", lambda _: False)
                stack.enter_context(no)
            if self.apart:
                stack.enter_context(patch.object(decode_cuda, "rotates", lambda *_: False))
            yield


def edited(folder: Path, source: str, name: str, edits: list[Edit], more: str = "") -> str:
    """The path of a kernels' source in which each of these texts, found once, is replaced.

    Raises:
        ValueError: a text that is not there once.
    """
    text = (KERNELS / source).read_text()
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{source} has {text.count(old)} of {old!r}")
        text = text.replace(old, new)
    path = folder / f"{name}.cu"
    path.write_text(text + more)
    return str(path)


def ways(folder: Path) -> list[Way]:
    more = ""
    for warps, stages, registers in MORE_KERNELS:
        for code, (name, inputs) in product(
            ("hyb", "mul1"), (("rotating", "ROTATED"), ("shared_x", "SHARED"))
        ):
            more += f"KERNEL({code}_{name}_{warps}_{stages}, {code.upper()}, 1, {warps}, {stages}, "
            more += f"{inputs}, {registers})\n"
    products = edited(folder, "decode.cu", "more", [], more)
    late = edited(folder, "rotation.cu", "late", LATE)
    return [
        Way("as it is"),
        Way("rotation apart", apart=True),
        Way("apart, product begins after its wait", rotation=late, apart=True),
        Way("all begin early", rotation=edited(folder, "rotation.cu", "early", EARLY),
            columns=edited(folder, "rotation_columns.cu", "early_columns", EARLY_COLUMNS)),
        Way("outputs rotated by a cluster", strips=False),
        Way("outputs rotated by a cluster, 384 threads of 80 registers",
            rotation=edited(folder, "rotation.cu", "roomy", ROOMY), threads=384, strips=False),
        Way("rotation apart, outputs by a cluster", apart=True, strips=False),
        Way("blocks of 128 by matrix instructions", quads=False),
        Way("256 threads, eight channels each",
            rotation=edited(folder, "rotation.cu", "twice", TWICE), threads=256, apart=True,
            strips=False),
        Way("256 threads", threads=256, apart=True, strips=False),
        Way("4 runs of A a block", part_tiles=4),
        *(Way(f"{warps} warps, {f'{stages} stages' if stages else 'codes into registers'}",
              decode=products, kernels=(warps, stages))
          for warps, stages, _ in MORE_KERNELS),
    ]  # fmt: skip


def is_right(layer: QuantizedLinear, x: Tensor, exact: Tensor) -> bool:
    ours = [layer(x) for _ in range(5)]
    return relative(ours[0], exact) < 5e-3 and all(torch.equal(y, ours[0]) for y in ours)


@torch.no_grad()
def rank() -> None:
    with tempfile.TemporaryDirectory() as folder:
        all_ways = ways(Path(folder))
        for out, inputs in SHAPES:
            for code in (HYB, MUL1):
                rank_layer(out, inputs, code, all_ways)


def rank_layer(out: int, inputs: int, code: TrellisCode, all_ways: list[Way]) -> None:
    layer = random_layer(out, inputs, code, "torch")
    x = torch.randn(1, inputs, device="cuda").bfloat16()
    exact = layer(x.float())
    layer.backend = "cuda"
    one, codes = layer.codes, many_codes(*layer.layer.padded, 2)
    found = []
    for way in all_ways:
        with way.used():
            layer.codes = one
            if is_right(layer, x, exact):
                found.append((layer_time(layer, codes, x), way.name))
            else:
                print(f"WRONG: {out}x{inputs} {code.name} {way.name}", flush=True)
    for time, name in sorted(found):
        print(f"{out}x{inputs} {code.name} layer {time:7.2f} {name}", flush=True)


LET_GO = "    wait_for_the_kernel_before();"
ROTATION_POINTS: list[tuple[str, str]] = [  # before the text; afterwards for LET_GO
    ("begins", "    const int lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4;\n"
     "    const int warp = threadIdx.x / LANES, warps"),
    ("let go", LET_GO),
    ("has read", "    wait_for_copies();\n    if (INPUT) {"),
    ("has sent", "    left += warp * left_words;\n"),
    ("has its mail", "    const float factor = factor_of();\n    for (int n = 0;"),
]  # fmt: skip
COLUMN_POINTS: list[tuple[str, str]] = [
    ("begins", "    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;\n"
     "    const int index = blockIdx.x - p.first_block, first"),
    ("let go", LET_GO),
    ("has read", "    wait_for_copies();\n    __syncthreads();\n    if (!works) return;"),
    ("has its columns", "    if (!works) return;\n    for (int k = 0; k < strips"),
]  # fmt: skip
BLOCK_POINTS: list[tuple[str, str]] = [
    ("begins", "    const int index = (blockIdx.x - p.first_block) * WARPS"),
    ("let go", LET_GO),
    ("has read", "    v = transformed(v);\n"),
]
PRODUCT_POINTS: list[tuple[str, str]] = [
    ("begins", "    const u32 bank = 4 * lane;\n"),
    ("asks for codes", "    const Row row{"),
    ("let go", LET_GO),
    ("has x", "    const auto read_quarters = [&] {\n"),
    ("has codes", "    const int lane_after = "),
    ("has multiplied", "    int column = warp;  // of the sums"),
    ("adds up", "    const int width = p.out_blocks * SIDE;\n"),
]


def mark(row: str) -> str:
    return f"    mark({row});\n"


def marks(points: list[tuple[str, str]], kernel: str) -> list[Edit]:
    """Edits that note when a block comes to each point, row ``kernel`` and the point's number."""
    edits = []
    for number, (name, text) in enumerate(points):
        note = mark(f"{kernel} + {number}")
        edits.append((text, f"{text}\n{note}" if name == "let go" else note + text))
    return edits


def with_clock(
    folder: Path, times: Tensor, source: str, edits: list[Edit], ends: dict[str, str]
) -> str:
    """A source whose blocks write the time, nanoseconds, to ``times``.

    ``ends`` has the calls after which a kernel ends, and the rows for that.
    """
    clock = f"""
__device__ __forceinline__ void mark(int point) {{
    if (threadIdx.x) return;
    unsigned long long time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time) :: "memory");
    ((unsigned long long *){times.data_ptr():#x}ull)[point * {BLOCKS} + blockIdx.x] = time;
}}

"""
    edits = [(call, f"{call} mark({row}); ") for call, row in ends.items()] + edits
    text = (KERNELS / source).read_text()
    begin = text.index("\n\n", text.index("constexpr")) + 2  # below what it includes
    return edited(folder, source, f"timed_{source[:-3]}", [(text[begin : begin + 80],
                  clock + text[begin : begin + 80]), *edits])  # fmt: skip


def timed(folder: Path, times: Tensor) -> list[str]:
    """Sources with clocks, in the order of a ``Way``; rows of kernel k begin at k POINTS."""
    last = POINTS - 1
    return [
        with_clock(
            folder, times, "decode.cu", marks(PRODUCT_POINTS, str(POINTS)),
            {"multiply<CODE, ROWS8, WARPS, STAGES, INPUTS>(p); ": str(POINTS + last)},
        ),
        with_clock(
            folder, times, "rotation.cu", marks(ROTATION_POINTS, f"(INPUT ? 0 : {2 * POINTS})"),
            {"rotate<true>(jobs.mine());": str(last),
             "rotate<false>(jobs.mine());": str(2 * POINTS + last)},
        ),
        with_clock(
            folder, times, "rotation_columns.cu", marks(COLUMN_POINTS, str(3 * POINTS)),
            {"    unrotate(jobs.mine());": str(3 * POINTS + last)},
        ),
        with_clock(
            folder, times, "rotation_blocks.cu", marks(BLOCK_POINTS, str(4 * POINTS)),
            {"    unrotate(jobs.mine());": str(4 * POINTS + last)},
        ),
    ]  # fmt: skip


POINTS = 8  # of a kernel, at most, its end being the last
TIMED = {
    "rotate_input": ROTATION_POINTS,
    "product": PRODUCT_POINTS,
    "unrotate_output": ROTATION_POINTS,
    "unrotate_columns": COLUMN_POINTS,
    "unrotate_blocks": BLOCK_POINTS,
}
"""By kernel, in the order of rows."""


@torch.no_grad()
def timeline() -> None:
    times = torch.zeros(len(TIMED) * POINTS, BLOCKS, dtype=torch.int64, device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        decode, rotation, columns, blocks = timed(Path(folder), times)
        way = Way("", decode, rotation, columns, blocks)
        for out, inputs in SHAPES:
            for code in (HYB, MUL1):
                layer = random_layer(out, inputs, code, "cuda")
                with way.used():
                    rotated = show(layer, f"{out}x{inputs} {code.name}", times)
                if not rotated:
                    with replace(way, apart=True, strips=False).used():
                        show(layer, f"{out}x{inputs} {code.name}, three kernels", times)


def show(layer: QuantizedLinear, label: str, times: Tensor) -> bool:
    """Prints a layer's timeline; returns whether its inputs were rotated by a kernel of their own.

    The last of 16 calls, each with weights of its own, is the one whose times remain.
    """
    codes = many_codes(*layer.layer.padded, 2)
    x = torch.randn(1, layer.in_features, device="cuda").bfloat16()

    def call(i: int) -> None:
        layer.codes = codes[i % len(codes)]
        layer(x)

    turn = iter(range(1 << 30))
    graph = captured(lambda: call(next(turn)), 16)
    runs = []
    for _ in range(REPLAYS):
        times.zero_()
        graph.replay()
        runs.append(times.cpu())
    print(label, flush=True)
    found = torch.stack(runs).double()
    found[found == 0] = float("nan")
    apart = bool(found[:, 1].isfinite().any())
    let_go = 1 if apart else POINTS + [name for name, _ in PRODUCT_POINTS].index("let go")
    found = (found - smallest(found[:, let_go])[:, None, None]) / 1e3
    for base, (kernel, points) in zip(count(0, POINTS), TIMED.items(), strict=False):
        names = {base + i: name for i, (name, _) in enumerate(points)} | {base + POINTS - 1: "ends"}
        for row, name in names.items():
            at = found[:, row]
            if bool(at.isfinite().any()):
                three = (smallest(at), at.nanmean(-1), -smallest(-at))
                cells = " ".join(f"{float(cell.mean()):6.2f}" for cell in three)
                print(f"    {kernel:16s} {name:15s} {cells}", flush=True)
    return apart


def smallest(at: Tensor) -> Tensor:
    """Of the last dimension, without what is missing."""
    return at.nan_to_num(float("inf")).amin(-1)


def main() -> None:
    torch.manual_seed(0)
    parts: dict[str, list[Callable[[], None]]] = {
        "rank": [rank], "timeline": [timeline], "all": [rank, timeline]
    }  # fmt: skip
    wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
    if wanted not in parts:
        sys.exit(__doc__)
    print(torch.cuda.get_device_name(), torch.__version__)
    for part in parts[wanted]:
        part()


if __name__ == "__main__":
    main()
