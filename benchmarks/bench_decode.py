"""Products with packed weights on one GPU: correctness first, then times with a cold L2 cache.

    python benchmarks/bench_decode.py [check | table | codes | variants | rows | host | rotations |
        all]

``table`` compares whole layers (rotations of the activations included) and bare products with
bf16 ``F.linear``; ``codes`` does so for what the Triton kernels run; ``variants`` ranks launches of
these (those in CUDA C++ have ``bench_decode_kernels.py``); ``rows`` finds how many rows the fused
kernel should take; ``host`` times what a call keeps the CPU for; ``rotations`` times those alone
(bench_rotations.py). A time is that of a CUDA
graph of calls, each with weights of its own, over their number: the weights together are larger
than the L2 cache, so they come from memory, as in a model; the kernels' instructions stay where
they are, likewise.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from softtrellis.modules import decode_cuda, decode_triton
from softtrellis.modules.decode import CodeValues
from softtrellis.modules.decode_triton import Launch
from softtrellis.modules.joint_linear import JointLinear
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TrellisSpec

SHAPES = ((4096, 11008), (11008, 4096), (2048, 8192), (576, 1536), (28672, 4096), (4096, 4096))
BATCHES = (1, 2, 4, 8, 16)
HOST_SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
HYB = TrellisCode(TrellisSpec(16, 2, 2), "hyb")
MUL1 = TrellisCode(TrellisSpec(16, 2, 1), "mul1", normalize=False, order="exl3")
OTHERS = [
    *(
        TrellisCode(TrellisSpec(16, k, 2 if name == "hyb" else 1), name)
        for name in ("hyb", "1mad", "3inst", "mul1", "mcg")
        for k in (1, 2, 3, 4)
    ),
    TrellisCode(TrellisSpec(12, 2, 2), "hyb"),
]
"""What the Triton kernels run; HYB at L = 16 and k = 2 where there are no CUDA kernels."""
REPLAYS = 9
LEAST_CALLS = 64  # of a graph, so that its own launch is hardly a part of a call's time
COLD_BYTES = 192 << 20  # a multiple of the L2 cache, which has 50 or 60 MB
LAUNCHES = [
    Launch(out_blocks=o, in_blocks=i, warps=w, splits=s, dot=dot)
    for dot, (o, i, w, s) in itertools.product(
        (True, False), ((2, 4, 4, 4), (4, 4, 4, 4), (4, 4, 4, 8), (4, 4, 8, 8), (4, 8, 8, 4))
    )
] + [Launch(out_blocks=4, in_blocks=4, warps=4, splits=8, stages=3)]


def random_codes(out: int, inputs: int, k: int) -> Tensor:
    shape = (out * inputs // 256, 16 * k)
    return torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device="cuda")


def random_layer(out: int, inputs: int, code: TrellisCode, backend: str) -> QuantizedLinear:
    exl3 = code.order == "exl3"
    form = LayerFormat(
        inputs, out, code, multiple=128 if exl3 else 16, block=128 if exl3 else None,
        channel_scales=exl3,
    )  # fmt: skip
    layer = QuantizedLinear(form, code.codebook(), backend).cuda()  # type: ignore[arg-type]
    layer.codes = random_codes(*form.padded, code.spec.k)
    layer.scale.fill_(0.02)
    layer.in_signs.random_(256)
    layer.out_signs.random_(256)
    return layer


def copies(size: int) -> int:
    """How many weights of so many bytes do not fit the L2 cache."""
    return max(4, min(512, math.ceil(COLD_BYTES / size)))


def captured(call: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls, after two others that compile and fill caches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which may still be filling the inputs
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def cold(call: Callable[[int], object], count: int) -> float:
    """Microseconds of ``call(i)``, i below ``count``, in a CUDA graph; the median of REPLAYS."""
    turns, calls = itertools.cycle(range(count)), count * math.ceil(LEAST_CALLS / count)
    graph = captured(lambda: call(next(turns)), calls)
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    return statistics.median(times)


def many_codes(out: int, inputs: int, k: int) -> Tensor:
    """[copies, tiles, words]."""
    one = random_codes(out, inputs, k)
    return torch.stack([one, *(torch.randint_like(one, -(1 << 15), 1 << 15)
                               for _ in range(copies(2 * one.numel()) - 1))])  # fmt: skip


def dense_time(x: Tensor, out: int) -> float:
    """Of bf16 ``F.linear``."""
    count = copies(2 * out * x.shape[1])
    weights = torch.randn(count, out, x.shape[1], device="cuda", dtype=torch.bfloat16)
    return cold(lambda i: functional.linear(x, weights[i]), count)


def layer_time(layer: QuantizedLinear | JointLinear, codes: Tensor, x: Tensor) -> float:
    """Of a whole layer, or of several of the same inputs."""

    def call(i: int) -> object:
        layer.codes = codes[i]
        return layer(x)

    return cold(call, len(codes))


def relative(ours: Tensor, exact: Tensor) -> float:
    error = float((ours.double() - exact.double()).norm() / exact.double().norm())
    return error if error == error else float("inf")


@torch.no_grad()
def check() -> bool:
    """Whether layers by the CUDA kernels are right, and the same every time."""
    worst = 0.0
    for (out, inputs), code in itertools.product(SHAPES, (HYB, MUL1)):
        layer = random_layer(out, inputs, code, "torch")
        x = torch.randn(16, inputs, device="cuda")
        exact = layer(x)
        layer.backend = "cuda"
        errors = []
        for rows in (1, 2, 3, 8, 16):
            ours = layer(x[:rows])
            same = all(torch.equal(layer(x[:rows]), ours) for _ in range(5))
            errors.append(relative(ours, exact[:rows]) if same else float("inf"))
        print(f"check {out}x{inputs} {code.name}: {max(errors):.1e}", flush=True)
        worst = max(worst, *errors)
    print("correct" if worst < 1e-3 else "WRONG", f"{worst:.1e}", flush=True)
    return worst < 1e-3


@torch.no_grad()
def table() -> None:
    print("| shape, rows | bf16 | HYB layer | its product | mul1 layer | its product | HYB is |")
    for out, inputs in SHAPES:
        layers = [(random_layer(out, inputs, code, "cuda"), code) for code in (HYB, MUL1)]
        codes = {code: many_codes(*layer.layer.padded, code.spec.k) for layer, code in layers}
        for rows in BATCHES:
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
            times = [dense_time(x, out)]
            for layer, code in layers:
                padded_out, padded_in = layer.layer.padded
                halves = torch.randn(rows, padded_in, device="cuda").half()
                times.append(layer_time(layer, codes[code], x))
                times.append(product_time(halves, codes[code], layer.table, code, padded_out))
            cells = " | ".join(f"{t:.2f}" for t in times)
            print(f"| {out}x{inputs}, {rows} | {cells} | {times[0] / times[1]:.2f}x", flush=True)


def product_time(x: Tensor, codes: Tensor, table: Tensor, code: TrellisCode, out: int) -> float:
    """Of the product alone."""
    return cold(lambda i: decode_cuda.multiply(x, codes[i], table, code, out), len(codes))


@torch.no_grad()
def codes() -> None:
    """Whole layers of 4096 x 11008 by the Triton kernels, and by CUDA's; correctness first."""
    with multiprocessing.get_context("spawn").Pool(12) as pool:
        pool.map(_compile, [(code, None) for code in OTHERS])
    (out, inputs), dense = SHAPES[0], {}
    for code in OTHERS:
        layer = random_layer(out, inputs, code, "torch")
        x = torch.randn(16, inputs, device="cuda", dtype=torch.bfloat16)
        exact = layer(x.float())
        own, weights = layer.codes, many_codes(out, inputs, code.spec.k)
        for backend in ("triton", "cuda") if decode_cuda.runs(code) else ("triton",):
            layer.backend, layer.codes = backend, own
            wrong, cells = relative(layer(x), exact), []
            for rows in (1, 16):
                if rows not in dense:
                    dense[rows] = dense_time(x[:rows], out)
                time = layer_time(layer, weights, x[:rows])
                cells.append(f"{time:.2f} ({dense[rows] / time:.2f}x)")
            name = f"{code.name}, L = {code.spec.L}, k = {code.spec.k}, {backend}"
            print(f"| {name} | {' | '.join(cells)} | error {wrong:.1e}", flush=True)


def _compile(case: tuple[TrellisCode, Launch | None]) -> None:
    code, launch = case
    codes = random_codes(256, 256, code.spec.k)
    x = torch.randn(1, 256, device="cuda").half()
    table = CodeValues.of(code, code.codebook().cuda()).table
    decode_triton.multiply(x, codes, table, code, 256, launch)


@torch.no_grad()
def variants() -> None:
    cases = list(itertools.product((HYB, MUL1), LAUNCHES))
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        pool.map(_compile, cases)
    for (out, inputs), code in itertools.product(SHAPES[:3], (HYB, MUL1)):
        found = rank(out, inputs, code)
        for time, name in sorted(found):
            print(f"{out}x{inputs} {code.name} {time:7.2f} {name}", flush=True)


def rank(out: int, inputs: int, code: TrellisCode) -> list[tuple[float, str]]:
    codes = many_codes(out, inputs, 2)
    table = CodeValues.of(code, code.codebook().cuda()).table
    x = torch.randn(1, inputs, device="cuda").half()
    found = [(product_time(x, codes, table, code, out), "cuda")]
    for launch in LAUNCHES:

        def call(i: int, launch: Launch = launch) -> Tensor:
            return decode_triton.multiply(x, codes[i], table, code, out, launch)

        found.append((cold(call, len(codes)), str(launch)))
    return found


@torch.no_grad()
def rows() -> None:
    for (out, inputs), code in itertools.product(((4096, 11008), (2048, 8192)), (HYB, MUL1)):
        codes = many_codes(out, inputs, 2)
        table = CodeValues.of(code, code.codebook().cuda()).table
        for batch in (16, 32, 48, 64, 128):
            x = torch.randn(batch, inputs, device="cuda").half()
            times = [
                cold(partial(way, x, codes, table, code, out), len(codes))
                for way in (fused, decoded)
            ]
            print(f"{out}x{inputs} {code.name} {batch} rows: fused {times[0]:.1f}, "
                  f"decoded first {times[1]:.1f}", flush=True)  # fmt: skip


@torch.no_grad()
def host() -> None:
    """What a call of a layer keeps the host for, which does not wait for the GPU."""
    for L, (out, inputs) in itertools.product((16, 12), HOST_SHAPES):
        code = TrellisCode(TrellisSpec(L, 2, 2), "hyb")
        form = LayerFormat(inputs, out, code, channel_scales=True, in_scales=True)
        layer = QuantizedLinear(form, code.codebook()).cuda()
        for rows in (1, 8):
            x, best = torch.randn(1, rows, inputs, device="cuda", dtype=torch.bfloat16), math.inf
            for _ in range(20):
                layer(x)
                torch.cuda.synchronize()
                began = perf_counter()
                for _ in range(100):
                    layer(x)
                best = min(best, perf_counter() - began)
            print(f"{out}x{inputs}, L = {L}, {rows} rows: {best * 1e4:.1f} us a call", flush=True)


def fused(x: Tensor, codes: Tensor, table: Tensor, code: TrellisCode, out: int, i: int) -> Tensor:
    return decode_cuda.multiply(x, codes[i], table, code, out)


def decoded(x: Tensor, codes: Tensor, table: Tensor, code: TrellisCode, out: int, i: int) -> Tensor:
    matrix = decode_triton.decode(codes[i], table, code, out, x.shape[1], torch.half)
    return torch.matmul(x, matrix.T)


def main() -> None:
    torch.manual_seed(0)
    wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
    print(torch.cuda.get_device_name(), torch.__version__)
    if wanted in ("rotations", "all"):
        import bench_rotations

        bench_rotations.report()
    if wanted == "rotations":
        return
    if wanted in ("check", "all") and not check():
        sys.exit(1)
    parts = {"table": table, "codes": codes, "variants": variants, "rows": rows, "host": host}
    for name, part in parts.items():
        if wanted in (name, "all"):
            part()


if __name__ == "__main__":
    main()
