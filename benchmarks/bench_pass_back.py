"""BCJR's passes, and its gradient without the average, beside each other: times a tile.

    python benchmarks/bench_pass_back.py [--device cpu --tiles 64] [--turns FOLDER]

Processes of two checkouts with one FOLDER compile side by side and then take turns with the GPU.
That the kernels are right is `softtrellis bench`'s and the tests' to say.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from turns import turn

from softtrellis.codes.codebook import codebook
from softtrellis.recipes.benchmark import Case, default_device, default_tiles
from softtrellis.recipes.parity import fresh_tiles
from softtrellis.recipes.timing import time_calls
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bcjr import bcjr, pass_back
from softtrellis.trellis.viterbi import viterbi

CASES = (
    Case("hyb", TrellisSpec(12, 2, 2)),
    Case("hyb", TrellisSpec(16, 2, 2)),
    Case("mul1", TrellisSpec(16, 2, 1)),
)


def calls(case: Case, tiles: int, T: float, device: Any) -> dict[str, Callable[[], object]]:
    """What is timed; hard codewords are there already, as they are in training."""
    spec, generator = case.spec, torch.Generator(device).manual_seed(0)
    table = codebook(case.code, spec).to(device)
    w, upstream = (fresh_tiles(tiles, spec, generator) for _ in range(2))
    hard = viterbi(w, table, spec).values
    x = w.clone().requires_grad_()
    soft = partial(bcjr, codebook=table, spec=spec, temperature=T)

    def gradient(values: Callable[[], torch.Tensor]) -> object:
        return torch.autograd.grad(values(), x, upstream)

    return {
        "forward": partial(soft, w),
        "forward + backward": partial(gradient, lambda: soft(x).values),
        "pass_back + backward": partial(
            gradient, lambda: pass_back(hard, x, table, spec, temperature=T)
        ),
    }


def measure(case: Case, tiles: int, T: float, device: Any) -> None:
    """Prints a line for each call: the median, and the 20th and the 80th percentile."""
    for name, call in calls(case, tiles, T, device).items():
        found = time_calls(call, device, repeats=20, seconds=0.5)
        median, low, high = (1e6 * x / tiles for x in (found.median, found.low, found.high))
        what = f"{case.code} L{case.spec.L} V{case.spec.V} T {T:g} {name:20} {tiles} tiles"
        print(f"{what} {median:.3f} us a tile ({low:.3f}-{high:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--tiles", type=int, help="by default as softtrellis bench")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.1, 0.05])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--turns", type=Path, help="a folder for locks")
    options = parser.parse_args()
    few = min(options.tiles or 64, 64)
    for case in CASES:
        for call in calls(case, few, options.temperature[0], options.device).values():
            call()  # compiles
    for _ in range(options.rounds):
        with turn(options.turns, options.device, alone=True):
            for case, T in product(CASES, options.temperature):
                tiles = options.tiles or default_tiles(case.spec, options.device)
                measure(case, tiles, T, options.device)


if __name__ == "__main__":
    main()
