"""Products with packed weights on one GPU: correctness first, then times with a cold L2 cache.

    python benchmarks/bench_decode.py [check | table | variants | rows | all]

``table`` compares whole layers (rotations of the activations included) and bare products with
bf16 ``F.linear``; ``variants`` ranks launches; ``rows`` finds how many rows the fused kernel should
take. A time is that of a CUDA graph of 16 times (read 256 MiB, call), less that of the reads.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from softtrellis.modules import decode_cuda, decode_triton
from softtrellis.modules.decode import CodeValues, decode_matmul
from softtrellis.modules.decode_triton import Launch
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TrellisSpec
from softtrellis.transforms import rotation_triton

SHAPES = ((4096, 11008), (11008, 4096), (2048, 8192), (576, 1536), (1536, 576), (4096, 4096))
BATCHES = (1, 2, 4, 8, 16)
HYB = TrellisCode(TrellisSpec(16, 2, 2), "hyb")
MUL1 = TrellisCode(TrellisSpec(16, 2, 1), "mul1", normalize=False, order="exl3")
OTHERS = [
    *(TrellisCode(TrellisSpec(16, k, 2), "hyb") for k in (1, 3, 4)),
    *(TrellisCode(TrellisSpec(16, 2, 1), name) for name in ("1mad", "3inst", "mcg", "mul1")),
]
CALLS, REPLAYS = 16, 9
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


_flush: list[Tensor] = []
_flush_time: list[float] = []


def flush() -> None:
    if not _flush:
        _flush.append(torch.zeros(256 << 18, dtype=torch.int32, device="cuda"))
    _flush[0].amax()


def captured(call: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls, after two others that compile and fill caches."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def graph_time(call: Callable[[], object]) -> float:
    """Microseconds of one of CALLS calls in a CUDA graph; the median of REPLAYS."""
    graph = captured(call, CALLS)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / CALLS)
    return statistics.median(times)


def cold(call: Callable[[], object]) -> float:
    """Microseconds of a call with nothing of its own in the L2 cache."""

    def flushed() -> None:
        flush()
        call()

    if not _flush_time:
        _flush_time.append(graph_time(flush))
    return graph_time(flushed) - _flush_time[0]


def relative(ours: Tensor, exact: Tensor) -> float:
    error = float((ours.double() - exact.double()).norm() / exact.double().norm())
    return error if error == error else float("inf")


@torch.no_grad()
def check() -> bool:
    worst = 0.0
    for (out, inputs), code in itertools.product(SHAPES, (HYB, MUL1)):
        layer = random_layer(out, inputs, code, "torch")
        x = torch.randn(17, inputs, device="cuda", dtype=torch.bfloat16)
        exact = layer(x.float())
        errors = []
        for backend, rows in itertools.product(("cuda", "triton"), (1, 2, 3, 8, 16, 17)):
            layer.backend = backend  # type: ignore[assignment]
            ours = layer(x[:rows].float())
            same = all(torch.equal(layer(x[:rows].float()), ours) for _ in range(5))
            errors.append(relative(ours, exact[:rows]) if same else float("inf"))
        print(f"check {out}x{inputs} {code.name}: {max(errors):.1e}", flush=True)
        worst = max(worst, *errors)
    for code in OTHERS:
        codes = random_codes(2048, 1536, code.spec.k)
        values = CodeValues.of(code, code.codebook().cuda())
        x = torch.randn(3, 1536, device="cuda").half()
        pair = [decode_matmul(x, codes, values, code, 2048, backend=b) for b in ("triton", "torch")]  # type: ignore[arg-type]
        error = relative(*pair)
        print(f"check {code.name} k={code.spec.k}: {error:.1e}", flush=True)
        worst = max(worst, error)
    print("correct" if worst < 1e-3 else "WRONG", f"{worst:.1e}")
    return worst < 1e-3


@torch.no_grad()
def table() -> None:
    print(
        "| shape, rows | bf16 | HYB layer | its product | mul1 layer | its product | Triton HYB |"
    )
    for (out, inputs), rows in itertools.product(SHAPES, BATCHES):
        x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        dense = torch.randn(out, inputs, device="cuda", dtype=torch.bfloat16)
        times = [cold(partial(functional.linear, x, dense))]
        for code in (HYB, MUL1):
            layer = random_layer(out, inputs, code, "cuda")
            padded_out, padded_in = layer.layer.padded
            halves = torch.randn(rows, padded_in, device="cuda").half()
            times.append(cold(partial(layer, x)))
            product = partial(decode_cuda.multiply, halves, layer.codes, layer.table, code)
            times.append(cold(partial(product, padded_out)))
        times.append(cold(partial(random_layer(out, inputs, HYB, "triton"), x)))
        cells = " | ".join(f"{t:.2f}" for t in times)
        print(f"| {out}x{inputs}, {rows} | {cells} | {times[0] / times[1]:.2f}x", flush=True)


def _compile(case: tuple[TrellisCode, Launch]) -> None:
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
    for rows, warps in itertools.product((16, 32), (2, 4, 8)):
        rotation_triton._LEFT_ROWS, rotation_triton._WARPS = rows, warps
        times = [time for n in (4096, 11008, 8192, 14336) for time in rotations(n)]
        cells = " ".join(f"{t:.2f}" for t in times)
        print(f"rotations in, out of 4096 11008 8192 14336, {rows} rows, {warps} warps: {cells}")


def rank(out: int, inputs: int, code: TrellisCode) -> list[tuple[float, str]]:
    codes = random_codes(out, inputs, 2)
    table = CodeValues.of(code, code.codebook().cuda()).table
    x = torch.randn(1, inputs, device="cuda").half()
    key = code.name, code.order, True
    kernel, found = decode_cuda._KERNELS[key], []
    for threads in (512, 448, 384, 256):
        decode_cuda._KERNELS[key] = replace(kernel, threads=threads)
        time = cold(partial(decode_cuda.multiply, x, codes, table, code, out))
        found.append((time, f"cuda, {threads} threads"))
    decode_cuda._KERNELS[key] = kernel
    for launch in LAUNCHES:
        time = cold(partial(decode_triton.multiply, x, codes, table, code, out, launch))
        found.append((time, str(launch)))
    return found


def rotations(n: int) -> tuple[float, float]:
    x = torch.randn(1, n, device="cuda", dtype=torch.bfloat16)
    signs = torch.zeros(n // 8, dtype=torch.uint8, device="cuda")
    shares, one = torch.randn(4, 1, n, device="cuda"), torch.ones(1, device="cuda")
    back = partial(rotation_triton.unrotate_output, shares, one, signs, one, None, None)
    return (
        cold(partial(rotation_triton.rotate_input, x, signs, None)),
        cold(partial(back, features=n, factor=1.0, dtype=torch.bfloat16)),
    )


@torch.no_grad()
def rows() -> None:
    for (out, inputs), code in itertools.product(((4096, 11008), (2048, 8192)), (HYB, MUL1)):
        codes = random_codes(out, inputs, 2)
        table = CodeValues.of(code, code.codebook().cuda()).table
        for batch in (16, 32, 48, 64, 128):
            x = torch.randn(batch, inputs, device="cuda").half()
            ways = (
                partial(fused, x, codes, table, code, out),
                partial(decoded, x, codes, table, code, out),
            )
            times = [cold(way) for way in ways]
            print(f"{out}x{inputs} {code.name} {batch} rows: fused {times[0]:.1f}, "
                  f"decoded first {times[1]:.1f}", flush=True)  # fmt: skip


def fused(x: Tensor, codes: Tensor, table: Tensor, code: TrellisCode, out: int) -> list[Tensor]:
    return [decode_cuda.multiply(part, codes, table, code, out) for part in x.split(16)]


def decoded(x: Tensor, codes: Tensor, table: Tensor, code: TrellisCode, out: int) -> Tensor:
    matrix = decode_triton.decode(codes, table, code, out, x.shape[1], torch.half)
    return torch.matmul(x, matrix.T)


def main() -> None:
    torch.manual_seed(0)
    wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
    print(torch.cuda.get_device_name(), torch.__version__)
    if not check():
        sys.exit(1)
    for name, part in (("table", table), ("variants", variants), ("rows", rows)):
        if wanted in (name, "all"):
            part()


if __name__ == "__main__":
    main()
