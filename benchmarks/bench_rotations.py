"""Rotations of one row of activations on one GPU, cut in several ways.

    python benchmarks/bench_rotations.py

Microseconds of a call in a CUDA graph of calls, each checked against float64 before. The first line
has the floors: kernels that do nothing, one after the other, and such as begin while the one before
ends. The last lines are whole layers of bench_decode.py, their products, and what lies between.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bench_decode import (
    HYB,
    MUL1,
    cold,
    layer_time,
    many_codes,
    product_time,
    random_layer,
    relative,
)

from softtrellis.transforms import rotation_cuda
from softtrellis.transforms.hadamard import hadamard_transform
from softtrellis.transforms.incoherence import Incoherence, pack_signs
from softtrellis.transforms.rotation_cuda import Launch
from softtrellis.trellis.launch_cuda import MAX_SHARED_BYTES

WIDTHS = (2048, 4096, 8192, 11008, 14336, 28672)
LAYERS = ((4096, 11008), (2048, 8192))
CUTS = [Launch(n, *cut) for n in (4, 8) for cut in ((256, 4), (256, 8), (384, 8), (512, 16))]
SHARES = 3
CALLS = 64


@triton.jit
def nothing():  # type: ignore[no-untyped-def]
    gdc_wait()
    gdc_launch_dependents()


def times(n: int, block: int | None = None, launch: Launch | None = None) -> str:
    """Of a rotation of n channels into the other basis, and out of it; or that it is wrong."""
    rotation = Incoherence.random(n, n, seed=n, block=block).to("cuda")
    signs = pack_signs(rotation.in_signs), pack_signs(rotation.out_signs)
    x = torch.randn(1, n, device="cuda").bfloat16()
    partials = torch.randn(SHARES, 1, n, device="cuda")
    one = torch.ones(1, device="cuda")

    def rotate() -> tuple[Tensor, Tensor]:
        return rotation_cuda.rotate_input(x, signs[0], None, block=block, launch=launch)

    def unrotate() -> Tensor:
        return rotation_cuda.unrotate_output(
            partials, one, signs[1], one, None, None,
            features=n, factor=1.0, dtype=torch.bfloat16, block=block, launch=launch,
        )  # fmt: skip

    rotated, norms = rotate()
    errors = (
        relative(rotated.double() * norms, rotation.rotate_input(x.double())),
        relative(unrotate(), rotation.unrotate_output(partials.double().sum(0))),
    )
    if not max(errors) < 5e-3:
        return f"WRONG {errors[0]:.1e} {errors[1]:.1e}"
    found = cold(lambda _: rotate(), CALLS), cold(lambda _: unrotate(), CALLS)
    return " ".join(f"{time:5.2f}" for time in found)


def by_columns(n: int) -> str:
    """Of the rest of a rotation out, of which the product has done each 32 channels."""
    rotation = Incoherence.random(n, n, seed=n).to("cuda")
    partials = torch.randn(SHARES, 1, n, device="cuda")
    strips = hadamard_transform(partials, block=32) * 32**0.5
    one = torch.ones(1, device="cuda")
    layers = [(pack_signs(rotation.out_signs), one, None, None, n)]

    def unrotate() -> Tensor:
        return rotation_cuda.unrotate_outputs(
            [strips], one, layers, factor=1.0, dtype=torch.bfloat16, by_strips=True
        )[0]

    error = relative(unrotate(), rotation.unrotate_output(partials.double().sum(0)))
    return f"{cold(lambda _: unrotate(), CALLS):5.2f}" if error < 5e-3 else f"WRONG {error:.1e}"


def floors() -> str:
    plain = cold(lambda _: nothing[(1,)](), CALLS)
    early = cold(lambda _: nothing[(1,)](launch_pdl=True), CALLS)
    return f"nothing {plain:.2f}, beginning early {early:.2f}"


@torch.no_grad()
def report() -> None:
    torch.manual_seed(0)
    print(floors())
    for n in WIDTHS:
        usual = rotation_cuda.transforms(n, None)[0].launch()
        print(f"{n} channels, in, out: {times(n)} {usual}; blocks of 128: {times(n, 128)}; "
              f"out by columns: {by_columns(n)}")  # fmt: skip
        for cut in CUTS:
            transform = rotation_cuda.transforms(n, None)[0]
            if transform.shared_bytes(cut) <= MAX_SHARED_BYTES:
                print(f"    {times(n, launch=cut)} {cut}", flush=True)
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
