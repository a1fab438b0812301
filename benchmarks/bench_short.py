"""BCJR for HYB at L = 12 on one GPU: the CUDA kernels' variants against Triton's.

    python benchmarks/bench_short.py [--tiles 131072] [--temperatures 0.03 0.1 0.3]

For each temperature and variant: its distance from float64 (some tiles) and from Triton (all), the
tiles that were not certified, and microseconds a tile, forward and backward. Weights are normal,
ends pinned to the hard code. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from softtrellis import codebook, viterbi
from softtrellis.trellis import bcjr_cuda, bcjr_torch, bcjr_triton
from softtrellis.trellis.bcjr_cuda import SHORT_SPEC
from softtrellis.trellis.launch_cuda import Kernel

VARIANTS = {
    "one warp": {tangent: bcjr_cuda._SHORT[tangent] for tangent in (0, 1)},
    "two warps": {
        tangent: Kernel("bcjr_short.cu", name, 512)
        for tangent, name in enumerate(("forward_by_two", "backward_by_two"))
    },
}
EXACT = 16


def microseconds(run: Callable[[], object], tiles: int, repeats: int = 5) -> float:
    """The median of some calls, per tile; after one more."""
    run()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / tiles)
    return round(statistics.median(times), 4)


def relative(found: Tensor, exact: Tensor) -> float:
    return float(f"{float((found.double() - exact).norm() / exact.norm()):.1e}")


def measure(tiles: int, temperature: float) -> None:
    torch.manual_seed(0)
    spec, C = SHORT_SPEC, codebook("hyb", SHORT_SPEC).cuda()
    w = torch.randn(tiles, spec.steps(), spec.V, device="cuda")
    g, gz = torch.randn_like(w), 0.1 * torch.randn(tiles, device="cuda")
    T = torch.full((tiles,), temperature, device="cuda")
    pins = (viterbi(w, C, spec).states[:, 0] >> spec.shift).long()
    problem = (w, C, spec, T, pins)

    some = (w[:EXACT].double(), C.double(), spec, T[:EXACT].double(), pins[:EXACT])
    exact_v, exact_z, _ = bcjr_torch.soft_forward(*some, False)
    upstream = (g[:EXACT].double(), gz[:EXACT].double())
    exact_g, _ = bcjr_torch.soft_backward(*some, exact_v, *upstream, False)

    values, log_z, _ = bcjr_triton.soft_forward(*problem, False)
    gradient, _ = bcjr_triton.soft_backward(*problem, values, g, gz, False)
    reference = (values, log_z, gradient)
    seconds = [
        microseconds(lambda: bcjr_triton.soft_forward(*problem, False), tiles),
        microseconds(lambda: bcjr_triton.soft_backward(*problem, values, g, gz, False), tiles),
    ]
    print(json.dumps({"kernels": "triton", "T": temperature, "us_per_tile": seconds}), flush=True)
    for name, kernels in VARIANTS.items():
        bcjr_cuda._SHORT.update(kernels)
        v, z, _ = bcjr_cuda.soft_forward(*problem, False)
        gw, _ = bcjr_cuda.soft_backward(*problem, v, g, gz, False)
        left = bcjr_cuda._start(*problem, [v.clone(), z.clone(), None, None, None])[1]
        left_g = bcjr_cuda._start(*problem, [v, None, g, gz, gw.clone()])[1]
        found = {
            "kernels": name,
            "T": temperature,
            "us_per_tile": [
                microseconds(lambda: bcjr_cuda.soft_forward(*problem, False), tiles),
                microseconds(
                    lambda v=v: bcjr_cuda.soft_backward(*problem, v, g, gz, False),  # type: ignore[misc]
                    tiles,
                ),
            ],
            "not_certified": [int(left), int(left_g)],
            "error": [
                relative(x[:EXACT], y)
                for x, y in zip((v, z, gw), (exact_v, exact_z, exact_g), strict=True)
            ],
            "from_triton": [
                relative(x, y.double()) for x, y in zip((v, z, gw), reference, strict=True)
            ],
            "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
        print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=131072)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.03, 0.1, 0.3])
    options = parser.parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name(), "tiles": options.tiles}))
    for temperature in options.temperatures:
        measure(options.tiles, temperature)


if __name__ == "__main__":
    main()
