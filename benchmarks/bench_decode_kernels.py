"""Which variant of the packed product's CUDA kernel is fastest, and what bounds it.

    python benchmarks/bench_decode_kernels.py [rank | profile]

``rank`` compiles variants of ``decode.cu``, checks each against the reference (a wrong one is named
and not timed), and times them at BATCHES with cold weights as ``bench_decode.py`` does: alone, and
one after the other with overlapping launches (bench_decode_layers.py has whole layers). Its floors,
in the same graphs: a kernel that does nothing, one that fills HYB's table, one that reads the
codes; and, beginning early, 8 blocks that add 1 to what the kernel before wrote, those in a
cluster, and those with one exchange. ``profile`` needs Nsight Compute (``ncu``).
"""

from __future__ import annotations

import csv
import io
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bench_decode import (
    HYB,
    MUL1,
    REPLAYS,
    cold,
    many_codes,
    random_codes,
    relative,
)  # fmt: skip

from softtrellis.modules import decode_cuda
from softtrellis.modules.decode import CodeValues, decode_matmul
from softtrellis.modules.decode_cuda import VARIANTS, Deal, Inputs, Variant, kind_of
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.trellis import launch_cuda
from softtrellis.trellis.launch_cuda import Kernel, Prepared, address

SHAPES = ((4096, 11008), (2048, 8192), (28672, 4096), (6144, 4096), (4096, 14336))
CHECKED = ((2048, 2048), (576, 1536), (272, 1040), (48, 80))
BATCHES = (1, 4, 16)
PRODUCTS: list[tuple[int, int, int, Inputs]] = [
    (8, 8, 128, "shared"), (8, 12, 104, "shared"), (8, 16, 80, "shared"), (8, 8, 128, "global"),
    (8, 12, 128, "global"), (16, 8, 168, "global"), (16, 12, 168, "global"),
    (16, 16, 128, "global"),
]  # fmt: skip
"""Rows, warps, registers of a thread, whence x comes."""
FLOORS = """
extern "C" __global__ void nothing(Parameters p) {}

extern "C" __global__ void __launch_bounds__(512) only_table(Parameters p) {
    TableFill<512> fill;
    fill.load(p.table), fill.store();
    __syncthreads();
    if (shared[threadIdx.x * 32 + p.batch] == p.least) p.partial[0] = 1.f;
}

extern "C" __global__ void __launch_bounds__(512) only_codes(Parameters p) {
    const long long all = (long long)p.out_blocks * p.in_blocks * TILE, step = gridDim.x * 512;
    u32 seen = 0;
    for (long long i = blockIdx.x * 512 + threadIdx.x; i < all; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = __ldg(p.codes + min(i + j * step, all - 1));
#pragma unroll
        for (int j = 0; j < 8; ++j) seen |= v[j].x & v[j].y & v[j].z & v[j].w;
    }
    if (seen == 0x12345678) p.partial[0] = 1.f;
}

template <bool CLUSTER, bool EXCHANGE>
__device__ __forceinline__ void add_one(const Parameters &p) {
    const u32 mailbox = address(shared), mail = mailbox + 16, warp = threadIdx.x / LANES;
    if (CLUSTER) {
        if (threadIdx.x == 0) expect_mail(mailbox, EXCHANGE ? 256 : 0);
        __syncwarp();
        cluster_arrive(), cluster_wait();
    }
    wait_for_the_kernel_before();
    let_the_next_kernel_begin();
    float *const at = p.partial + blockIdx.x * 256 + threadIdx.x;
    const float x = __uint_as_float(read_word(at)) + 1.f;
    if (EXCHANGE) {
        const u32 rank = threadIdx.x % LANES;
        if (rank < 8) send(mail + 4 * (8 * warp + blockIdx.x % 8), rank, mailbox, (u32)x);
        wait_for_mail(mailbox);
    }
    *at = x;
}

extern "C" __global__ void relay(Parameters p) { add_one<false, false>(p); }
extern "C" __global__ void relay_cluster(Parameters p) { add_one<true, false>(p); }
extern "C" __global__ void relay_exchange(Parameters p) { add_one<true, true>(p); }
"""
STALLS = (
    "long_scoreboard", "short_scoreboard", "mio_throttle", "lg_throttle", "math_pipe_throttle",
    "dispatch_stall", "no_instruction", "branch_resolving", "barrier", "wait", "not_selected",
)  # fmt: skip
METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__warps_active.avg.per_cycle_active",
    "dram__bytes_read.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_active",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_fmaheavy.avg.pct_of_peak_sustained_active",
    "sm__icc_requests_lookup_hit.sum",
    "sm__icc_requests_lookup_miss.sum",
    *(f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio" for why in STALLS),
)
PROFILED_LAUNCHES = 12


def write_variants(folder: Path) -> dict[TrellisCode, list[Variant]]:
    """Variants of ``decode.cu``, in one source file."""
    text = (Path(launch_cuda.__file__).parent / "cuda" / "decode.cu").read_text()
    path, found = folder / "decode_variants.cu", defaultdict(list)
    for code, (rows, warps, registers, inputs) in itertools.product((HYB, MUL1), PRODUCTS):
        name = f"{code.name}_{rows}rows_{warps}warps_{registers}registers_{inputs}_x"
        text += f"KERNEL({name}, {code.name.upper()}, 16, {rows // 8}, {warps}, "
        text += f"{inputs.upper()}, {registers})\n"
        kernel = Kernel(str(path), name, 32 * warps)
        found[code].append(Variant(kernel, rows, code == HYB, inputs))
    path.write_text(text + FLOORS)
    return found


def values_of(code: TrellisCode) -> CodeValues:
    return CodeValues.of(code, code.codebook().cuda())


def is_right(variant: Variant, code: TrellisCode) -> bool:
    values, worst = values_of(code), 0.0
    for out, inputs in CHECKED:
        codes = random_codes(out, inputs, 2)
        for batch in (1, 3, 8, 16):
            if not variant.takes(batch, inputs):
                continue
            x = torch.randn(batch, inputs, device="cuda").half()
            exact = decode_matmul(x, codes, values, code, out, backend="torch")
            ours = decode_cuda.launch(variant, x, codes, values.table, out)
            worst = max(worst, relative(ours.sum(0) * values.factor, exact))
    return worst < 1e-3


def alone(
    variant: Variant, x: Tensor, codes: Tensor, table: Tensor, out: int, overlap: bool, i: int
) -> Tensor:
    return decode_cuda.launch(variant, x, codes[i], table, out, overlap=overlap)


def floor(kernel: Kernel, x: Tensor, codes: Tensor, table: Tensor, out: int, i: int) -> Tensor:
    """A launch of a kernel that does part of the work, as large as HYB's."""
    deal = Deal.of(out, x.shape[1], 16, launch_cuda.multiprocessors(x.device))
    partial_sums = torch.empty(deal.shares, 1, out, device=x.device)
    numbers = [1, out // 16, x.shape[1] // 16, deal.shares, deal.least, deal.more, 0, 0, 0]
    kernel(
        deal.grid, VARIANTS["hyb", "rows", 16][0].shared_bytes(1, x.shape[1]), x.device,
        [codes[i], table, x, partial_sums, None, None, None], numbers,
    )  # fmt: skip
    return partial_sums


def relay(launch: Prepared, numbers: Tensor, i: int) -> None:
    """8 blocks that each add 1 to 256 numbers of the kernel before; ``i`` is not used."""
    launch(numbers.device.index, [[0, 0, 0, address(numbers), 0, 0, 0]])


def relays(source: str) -> None:
    for name, cluster in (("relay", 1), ("relay_cluster", 8), ("relay_exchange", 8)):
        numbers = torch.zeros(8 * 256, device="cuda")
        kernel = Kernel(source, name, 256)
        launch = Prepared(kernel, 8, 512, [(7, [0] * 9)], cluster=cluster, overlap=True)
        call = partial(relay, launch, numbers)
        before = cold(call, 64)
        torch.cuda.synchronize()
        right = bool((numbers == numbers[0]).all()) and float(numbers[0]) == 2 + 64 * (REPLAYS + 1)
        print(f"floor {before:7.2f} {name}" if right else f"WRONG: {name}", flush=True)


@torch.no_grad()
def rank() -> None:
    with tempfile.TemporaryDirectory() as folder:
        variants = write_variants(Path(folder))
        source = variants[HYB][0].kernel.source
        right = {code: [v for v in found if is_right(v, code)] for code, found in variants.items()}
        for code, found in variants.items():
            for variant in found:
                if variant not in right[code]:
                    print(f"WRONG: {variant.kernel.name}", flush=True)
        relays(source)
        for out, inputs in SHAPES:
            x = torch.randn(1, inputs, device="cuda").half()
            codes, table = many_codes(out, inputs, 2), values_of(HYB).table
            for name in ("nothing", "only_table", "only_codes"):
                call = partial(floor, Kernel(source, name, 512), x, codes, table, out)
                print(f"{out}x{inputs} floor {cold(call, len(codes)):7.2f} {name}", flush=True)
            for code, batch in itertools.product((HYB, MUL1), BATCHES):
                rank_shape(out, batch, inputs, code, right[code], codes)


def rank_shape(
    out: int, batch: int, inputs: int, code: TrellisCode, variants: list[Variant], codes: Tensor
) -> None:
    x, table = torch.randn(batch, inputs, device="cuda").half(), values_of(code).table
    found: list[tuple[list[float], str]] = []
    usual = next(v for v in VARIANTS[kind_of(code)] if v.takes(batch, inputs))
    for variant in [usual, *(v for v in variants if batch > v.rows - 8)]:
        if variant.takes(batch, inputs):
            times = [
                cold(partial(alone, variant, x, codes, table, out, overlap), len(codes))
                for overlap in (False, True)
            ]
            found.append((times, variant.kernel.name))
    for times, name in sorted(found):
        cells = " ".join(f"{t:7.2f}" for t in times)
        print(f"{out}x{inputs} {code.name} {batch} rows: {cells} {name}", flush=True)


def products() -> None:
    """What ``profile`` runs: some products, each with codes of its own."""
    for code in (HYB, MUL1):
        codes, table = many_codes(4096, 11008, 2), values_of(code).table
        x = torch.randn(1, 11008, device="cuda").half()
        for i in range(PROFILED_LAUNCHES):
            decode_cuda.multiply(x, codes[i], table, code, 4096)
        torch.cuda.synchronize()


def profile() -> None:
    """Prints what bounds the product of 4096 x 11008, of both codes."""
    ncu = shutil.which("ncu")
    if ncu is None:
        sys.exit("profile needs Nsight Compute: no ncu in the PATH")
    query = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, check=True)
    known = {line.split()[0] for line in query.stdout.splitlines() if line.split()}
    missing = [m for m in METRICS if m.split(".")[0] not in known]
    print("not known to this ncu:", ", ".join(missing) or "none")
    for code in (HYB, MUL1):
        name = VARIANTS[kind_of(code)][0].kernel.name
        answer = subprocess.run(
            [ncu, "--csv", "--clock-control", "none", "--kernel-name", name,
             "--launch-skip", str(PROFILED_LAUNCHES - 2), "--launch-count", "2",
             "--metrics", ",".join(m for m in METRICS if m not in missing),
             sys.executable, __file__, "products"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        rows = [line for line in answer.stdout.splitlines() if line.startswith('"')]
        if answer.returncode or not rows:
            sys.exit(answer.stdout + answer.stderr)
        values = defaultdict(list)
        for row in csv.DictReader(io.StringIO("\n".join(rows))):
            values[row["Metric Name"]].append(f"{row['Metric Value']} {row['Metric Unit']}")
        for metric in METRICS:
            if metric in values:
                print(f"{name} {metric}: {', '.join(values[metric])}", flush=True)


def main() -> None:
    torch.manual_seed(0)
    parts = {"rank": rank, "profile": profile, "products": products}
    wanted = sys.argv[1] if len(sys.argv) > 1 else "rank"
    if wanted not in parts:
        sys.exit(__doc__)
    if wanted == "rank":
        print(torch.cuda.get_device_name(), torch.__version__)
    parts[wanted]()


if __name__ == "__main__":
    main()
