"""The public functions: parity with float64 first, then times of bcjr and viterbi.

python benchmarks/bench_public.py cpu
python benchmarks/bench_public.py cuda
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from softtrellis.codes.codebook import codebook
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bcjr import bcjr
from softtrellis.trellis.viterbi import viterbi

CASES = (
    # code, trellis, tiles on a GPU, tiles on the CPU
    ("hyb", TrellisSpec(16, 2, 2), 3168, 64),
    ("hyb", TrellisSpec(14, 2, 2), 6336, 64),
    ("hyb", TrellisSpec(12, 2, 2), 8448, 64),
    ("mul1", TrellisSpec(16, 2, 1), 1056, 32),
)
TOLERANCE = 2e-5


def parity(name: str, spec: TrellisSpec, device: str) -> str:
    """Relative errors of values and gradients of 2 tiles at T = 0.05; refuses to go on if large."""
    w = torch.randn(2, spec.steps(), spec.V, device=device)
    g = torch.randn_like(w)
    C = codebook(name, spec).to(device)
    results = []
    for dtype in (torch.float32, torch.float64):
        x = w.to(dtype).requires_grad_()
        values = bcjr(x, C.to(dtype), spec, temperature=0.05).values
        results.append((values.detach(), torch.autograd.grad(values, x, g.to(dtype))[0]))
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    if max(errors) > TOLERANCE:
        raise SystemExit(f"{name} {spec} is wrong by {max(errors):.1e}: not timed")
    return f"values {errors[0]:.1e}, grad {errors[1]:.1e}"


def seconds(function: Callable[[], object], repeats: int = 5) -> list[float]:
    """Sorted wall times."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])


def report(label: str, found: list[float], tiles: int) -> None:
    """Median, least and greatest microseconds per tile."""
    each = [1e6 * t / tiles for t in found]
    median = statistics.median(each)
    print(f"  {label}: {median:.2f} us per tile ({each[0]:.2f} to {each[-1]:.2f})", flush=True)


def measure(code: str, spec: TrellisSpec, tiles: int, device: str) -> None:
    """Times one case."""
    C = codebook(code, spec).to(device)
    w = torch.randn(tiles, spec.steps(), spec.V, device=device)
    x, g = w.clone().requires_grad_(), torch.randn_like(w)

    def forward(T: float) -> None:
        bcjr(w, C, spec, temperature=T)

    def both(T: float) -> None:
        torch.autograd.grad(bcjr(x, C, spec, temperature=T).values, x, g)

    for T in (0.3, 0.05, 0.03):
        report(f"T={T} forward", seconds(partial(forward, T)), tiles)
        report(f"T={T} forward + backward", seconds(partial(both, T)), tiles)
    report("tail-biting viterbi", seconds(lambda: viterbi(w, C, spec)), tiles)


def main() -> None:
    """Prints a line per measurement."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else threads
    print(f"{device} ({name}), torch {torch.__version__}")
    for code, spec, many, few in CASES:
        print(f"{code} {spec}: {parity(code, spec, device)}", flush=True)
        measure(code, spec, many if device == "cuda" else few, device)


if __name__ == "__main__":
    main()
