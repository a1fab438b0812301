"""Rotations of one row of activations on one GPU: CUDA's and Triton's, cut in several ways.

    python benchmarks/bench_rotations.py

Microseconds of a call in a CUDA graph of calls. The first line has the floors: kernels that do
nothing, one after the other, and such as begin while the one before ends. The last lines are whole
layers of bench_decode.py, their products, and what lies between.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bench_decode import HYB, MUL1, cold, layer_time, many_codes, product_time, random_layer

from softtrellis.transforms import rotation_cuda, rotation_triton
from softtrellis.transforms.rotation_cuda import Launch

WIDTHS = (576, 1536, 2048, 4096, 8192, 11008, 14336)
LAYERS = ((4096, 11008), (2048, 8192))
SHARES = (1, 4)
CALLS = 64


@triton.jit
def nothing():  # type: ignore[no-untyped-def]
    gdc_wait()
    gdc_launch_dependents()


def calls_of(
    kernels: ModuleType, n: int, shares: int, block: int | None, **options: Launch
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A rotation of n channels into the other basis, and out of it."""
    generator = torch.Generator("cuda").manual_seed(n)
    x = torch.randn(1, n, device="cuda", generator=generator).bfloat16()
    signs = torch.zeros(n // 8, dtype=torch.uint8, device="cuda").random_(generator=generator)
    partials = torch.randn(shares, 1, n, device="cuda", generator=generator)
    one = torch.ones(1, device="cuda")
    back = partial(kernels.unrotate_output, partials, one, signs, one, None, None, **options)
    return (
        lambda: kernels.rotate_input(x, signs, None, block=block, **options)[0],
        lambda: back(features=n, factor=1.0, dtype=torch.bfloat16, block=block),
    )


def times(
    kernels: ModuleType, n: int, shares: int, block: int | None = None, **options: Launch
) -> str:
    calls = calls_of(kernels, n, shares, block, **options)
    return " ".join(f"{time(call):6.2f}" for call in calls)


def time(call: Callable[[], Tensor]) -> float:
    return float(cold(lambda _: call(), CALLS))


def _compile(n: int) -> None:
    for block in (None, 128):
        if n % (block or 1) == 0:
            for call in calls_of(rotation_triton, n, 4, block):
                call()


def check(n: int, block: int | None) -> None:
    pairs = (calls_of(kernels, n, 4, block) for kernels in (rotation_cuda, rotation_triton))
    for ours, theirs in zip(*pairs, strict=True):
        exact = theirs().float()
        error = float((ours().float() - exact).norm() / exact.norm())
        if not error < 5e-3:
            sys.exit(f"WRONG: {n} channels, block {block}: {error:.1e}")


def floors() -> str:
    plain = cold(lambda _: nothing[(1,)](), CALLS)
    early = cold(lambda _: nothing[(1,)](launch_pdl=True), CALLS)
    return f"nothing {plain:.2f}, beginning early {early:.2f}"


@torch.no_grad()
def report() -> None:
    torch.manual_seed(0)
    with multiprocessing.get_context("spawn").Pool(len(WIDTHS)) as pool:
        pool.map(_compile, WIDTHS)
    print(floors())
    for n in WIDTHS:
        for block in (None, 128) if n % 128 == 0 else (None,):
            check(n, block)
            for shares in SHARES:
                named = f"{n} channels, block {block}, {shares} shares: in, out"
                usual = rotation_cuda.transforms(n, block)[0].launch()
                print(f"{named} | cuda {times(rotation_cuda, n, shares, block)} | "
                      f"triton {times(rotation_triton, n, shares, block)} | {usual}",
                      flush=True)  # fmt: skip
        for slices in rotation_cuda.CLUSTERS:
            cuts = [Launch(slices, *cut) for cut in ((256, 4), (256, 8), (384, 8), (512, 16))]
            found = [
                f"{cut.threads} threads, {cut.part_tiles} tiles "
                f"{times(rotation_cuda, n, 4, launch=cut)}"
                for cut in cuts
            ]
            print(f"    {slices} blocks: {' | '.join(found)}", flush=True)
    for (out, inputs), code in ((shape, code) for shape in LAYERS for code in (HYB, MUL1)):
        layer = random_layer(out, inputs, code, "cuda")
        padded_out, padded_in = layer.layer.padded
        codes = many_codes(padded_out, padded_in, 2)
        x = torch.randn(1, inputs, device="cuda", dtype=torch.bfloat16)
        halves = torch.randn(1, padded_in, device="cuda").half()
        whole = layer_time(layer, codes, x)
        product = product_time(halves, codes, layer.table, code, padded_out)
        print(f"{out}x{inputs} {code.name}: layer {whole:.2f}, product {product:.2f}, "
              f"rotations {whole - product:.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    report()
