"""When each kernel of a packed layer does what at batch 1, on one GPU.

    python benchmarks/bench_decode_timeline.py

Puts clocks into the kernels: when, in microseconds after the first block of the layer's first
kernel was let go by the kernel before, the first, the average and the last block came to each
point; the mean of REPLAYS. Layers as bench_decode_layers.py has them; those whose products rotate
their row also with a kernel for that.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import count, product
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bench_decode import HYB, MUL1, captured, many_codes
from bench_decode_layers import (
    KERNELS,
    SHAPES,
    Edit,
    Sources,
    edited,
    label_of,
    layers_of,
    padded,
    random_joint,
    usual_way,
)  # fmt: skip

from softtrellis.modules.joint_linear import JointLinear

REPLAYS = 100
BLOCKS = 256  # most of a grid
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
    ("begins", "    const int warp = threadIdx.x / LANES;\n"),
    ("let go", LET_GO),
    ("has read", "    wait_for_copies();\n    __syncthreads();\n    if (!works) return;"),
    ("has its columns", "    if (!works) return;\n    float result"),
]
BLOCK_POINTS: list[tuple[str, str]] = [
    ("begins", "    const int index = (blockIdx.x - p.first_block) * WARPS"),
    ("let go", LET_GO),
    ("has read", "    v = transformed(v);\n"),
]
PRODUCT_POINTS: list[tuple[str, str]] = [
    ("begins", "    const u32 bank = 4 * lane;\n"),
    ("asks for codes", "    const Row row{"),
    ("let go", LET_GO),
    ("has x", "    const int lane_after = "),
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


def timed(folder: Path, times: Tensor) -> Sources:
    """Sources with clocks; rows of kernel k begin at k POINTS."""
    last = POINTS - 1
    return Sources(
        with_clock(
            folder, times, "decode.cu", marks(PRODUCT_POINTS, str(POINTS)),
            {"multiply<CODE, L, ROWS8, WARPS, INPUTS>(p); ": str(POINTS + last)},
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
    )  # fmt: skip


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
        sources = timed(Path(folder), times)
        for (outs, inputs), code in product(SHAPES, (HYB, MUL1)):
            joint = random_joint(outs, inputs, code, "cuda")
            for way in dict.fromkeys((usual_way(joint), usual_way(joint, False))):
                with way.used(sources):
                    show(joint, f"{label_of(outs, inputs, code)}, {way.name}", times)


def show(joint: JointLinear, label: str, times: Tensor) -> None:
    """Prints a layer's timeline.

    The last of 16 calls, each with weights of its own, is the one whose times remain.
    """
    outs, inputs = padded(joint)
    codes = many_codes(sum(outs), inputs, 2)
    x = torch.randn(1, layers_of(joint)[0].in_features, device="cuda").bfloat16()

    def call(i: int) -> None:
        joint.codes = codes[i % len(codes)]
        joint(x)

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


def smallest(at: Tensor) -> Tensor:
    """Of the last dimension, without what is missing."""
    return at.nan_to_num(float("inf")).amin(-1)


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    timeline()


if __name__ == "__main__":
    main()
