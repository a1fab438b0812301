"""The Hadamard transform cut into matmuls in several ways: parity first, then times.

    python benchmarks/bench_hadamard.py cuda [ROWS]

"present" is `hadamard_transform` as it is; "copies W" does the same (one matmul of two matrices per
factor, a transposing copy between them) with factors of at most W; "batched W" multiplies from the
left in place, by a batch of small matmuls with one shared factor; "dense" is one [n, n] matmul.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from softtrellis.transforms.hadamard import _base_matrix, _paley_factors, hadamard_transform

DIMENSIONS = (576, 1536, 2048, 4096, 8192, 14336)
WIDTHS = (16, 64, 128)
LARGEST_DENSE = 4096
TOLERANCE = 1e-5
CALLS = 20
Transform = Callable[[Tensor], Tensor]


def groups(orders: list[int], widest: int) -> list[list[int]]:
    """Neighbouring orders together, up to a product of ``widest``."""
    found: list[list[int]] = []
    for order in orders:
        if found and math.prod(found[-1]) * order <= widest:
            found[-1].append(order)
        else:
            found.append([order])
    return found


def factors(n: int, widest: int, device: str) -> list[Tensor]:
    """Orthonormal factors whose Kronecker product is H_n, few and of even sizes."""
    paley = list(_paley_factors(n) or ())
    orders = [*paley, *[2] * ((n // math.prod(paley)).bit_length() - 1)]
    fewest = len(groups(orders, widest))
    width = next(w for w in range(2, widest + 1) if len(groups(orders, w)) == fewest)
    signs = [reduce(np.kron, map(_base_matrix, group)) for group in groups(orders, width)]
    return [torch.tensor(s / math.sqrt(len(s)), dtype=torch.float32, device=device) for s in signs]


def copies(matrices: list[Tensor], x: Tensor) -> Tensor:
    y, right = x, x.shape[-1]
    for matrix in matrices:
        size = matrix.shape[0]
        y = y.reshape(x.numel() // right, size, right // size)
        right //= size
        y = torch.matmul(y.mT.reshape(-1, size), matrix.mT).reshape(-1, right, size).mT
    return y.reshape(x.shape)


def batched(matrices: list[Tensor], x: Tensor) -> Tensor:
    y, right = x, x.shape[-1]
    for matrix in matrices:
        size = matrix.shape[0]
        right //= size
        if right == 1:
            y = torch.matmul(y.reshape(-1, size), matrix.mT)
        else:
            y = y.reshape(-1, size, right)
            y = torch.bmm(matrix.expand(y.shape[0], size, size), y)
    return y.reshape(x.shape)


def microseconds(function: Callable[[], object]) -> float:
    """Median of 5 rounds, each of several calls one after the other."""
    rounds = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(CALLS):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rounds.append(1e6 * (time.perf_counter() - began) / CALLS)
    return sorted(rounds[1:])[2]


def replayed(function: Callable[[], object]) -> Callable[[], object]:
    """The function as a CUDA graph, so that its time is the device's alone."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def formulations(n: int, device: str) -> dict[str, tuple[Transform, str]]:
    """Name to transform and its factors."""
    found: dict[str, tuple[Transform, str]] = {"present": (hadamard_transform, "")}
    for width in WIDTHS:
        matrices = factors(n, width, device)
        sizes = " x ".join(str(len(matrix)) for matrix in matrices)
        found[f"copies {width}"] = (partial(copies, matrices), sizes)
        found[f"batched {width}"] = (partial(batched, matrices), sizes)
    if n <= LARGEST_DENSE:
        dense = reduce(torch.kron, factors(n, n, device))
        found["dense"] = (lambda x: torch.matmul(x, dense.mT), "")
    return found


def measure(n: int, rows: int, device: str) -> None:
    """Prints a line per formulation of one size."""
    x = torch.randn(rows, n, device=device)
    exact = hadamard_transform(x.double())
    time_of = (lambda f: microseconds(replayed(f))) if device == "cuda" else microseconds
    out = torch.empty_like(x)
    copy = time_of(lambda: out.copy_(x))
    print(f"n={n}: a copy takes {copy:.1f} us, {8e-3 * x.numel() / copy:.0f} GB/s", flush=True)
    for name, (transform, sizes) in formulations(n, device).items():
        error = float((transform(x).double() - exact).norm() / exact.norm())
        if not error <= TOLERANCE:
            raise SystemExit(f"{name} at n={n} is wrong by {error:.1e}: not timed")
        call = microseconds(partial(transform, x))
        alone = time_of(partial(transform, x))
        speed = 8e-3 * x.numel() / alone
        print(
            f"  {name:12} {call:8.1f} us a call, {alone:8.1f} us on the device, {speed:5.0f} GB/s "
            f"({copy / alone:4.0%} of a copy), error {error:.1e}  {sizes}",
            flush=True,
        )


@torch.inference_mode()
def main() -> None:
    """Prints what it runs on, then the sizes."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    rows = int(sys.argv[2]) if len(sys.argv) > 2 else 2048
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    tf32 = torch.backends.cuda.matmul.allow_tf32
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, TF32 {tf32}, {rows} rows")
    for n in DIMENSIONS:
        measure(n, rows, device)


if __name__ == "__main__":
    main()
