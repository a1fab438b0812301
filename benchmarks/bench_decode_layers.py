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
from itertools import product
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
        decode, rotation: sources in place of ``decode.cu`` and ``rotation.cu``.
        apart: the product never rotates its row itself.
        quads: whether blocks of 128 channels of the outputs are a warp's work.
        threads: of a rotation's block, at most.
        part_tiles: see ``Launch``.
        kernels: warps and stages of other kernels, of ``MORE_KERNELS``.
    """

    name: str
    decode: str = "decode.cu"
    rotation: str = "rotation.cu"
    apart: bool = False
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
                patch.object(Transform, "launch", lambda transform: self.cut(usual(transform))),
            ):
                stack.enter_context(change)
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
        Way("all begin early", rotation=edited(folder, "rotation.cu", "early", EARLY)),
        Way("blocks of 128 by matrix instructions", quads=False),
        Way("256 threads, eight channels each",
            rotation=edited(folder, "rotation.cu", "twice", TWICE), threads=256),
        Way("256 threads", threads=256),
        Way("384 threads", threads=384),
        Way("384 threads of 80 registers on the way out",
            rotation=edited(folder, "rotation.cu", "roomy", ROOMY), threads=384),
        Way("4 runs of A a cluster", part_tiles=4),
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


def with_clock(folder: Path, times: Tensor, source: str, points: list[tuple[str, str]]) -> str:
    """A source whose blocks write the time, nanoseconds, to ``times``; its end is a row too."""
    clock = f"""
__device__ __forceinline__ void mark(int point) {{
    if (threadIdx.x) return;
    unsigned long long time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time) :: "memory");
    ((unsigned long long *){times.data_ptr():#x}ull)[point * {BLOCKS} + blockIdx.x] = time;
}}
"""
    into = source == "rotation.cu"
    edits = marks(points, f"(INPUT ? 0 : {2 * POINTS})" if into else str(POINTS))
    edits.append(("extern __shared__", clock + "extern __shared__"))
    if into:
        for name, row in (("true", POINTS - 1), ("false", 3 * POINTS - 1)):
            call = f"    rotate<{name}>(jobs.mine());\n"
            edits.append((call, call + mark(str(row))))
    else:
        call = "multiply<CODE, ROWS8, WARPS, STAGES, INPUTS>(p); "
        edits.append((call, f"{call} mark({2 * POINTS - 1}); "))
    return edited(folder, source, f"timed_{source[:-3]}", edits)


POINTS = 8  # of a kernel, at most, its end being the last


@torch.no_grad()
def timeline() -> None:
    times = torch.zeros(3 * POINTS, BLOCKS, dtype=torch.int64, device="cuda")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rotation = with_clock(folder, times, "rotation.cu", ROTATION_POINTS)
        way = Way("", with_clock(folder, times, "decode.cu", PRODUCT_POINTS), rotation)
        for out, inputs in SHAPES:
            for code in (HYB, MUL1):
                layer = random_layer(out, inputs, code, "cuda")
                with way.used():
                    rotated = show(layer, f"{out}x{inputs} {code.name}", times)
                if not rotated:
                    with replace(way, apart=True).used():
                        show(layer, f"{out}x{inputs} {code.name}, rotation apart", times)


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
    for kernel, (base, points) in {
        "rotate_input": (0, ROTATION_POINTS),
        "product": (POINTS, PRODUCT_POINTS),
        "unrotate_output": (2 * POINTS, ROTATION_POINTS),
    }.items():
        names = {base + i: name for i, (name, _) in enumerate(points)} | {base + POINTS - 1: "ends"}
        for row, name in names.items():
            at = found[:, row]
            if bool(at.isfinite().any()):
                three = (smallest(at), at.nanmean(-1), -smallest(-at))
                cells = " ".join(f"{float(cell.mean()):6.2f}" for cell in three)
                print(f"    {kernel:15s} {name:15s} {cells}", flush=True)
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
