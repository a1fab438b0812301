"""The public functions on a GPU: parity with float64, and times of forward plus backward.

    python benchmarks/gpu_public.py
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from softtrellis.codes.codebook import codebook
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bcjr import bcjr
from softtrellis.trellis.viterbi import viterbi

CASES = (
    ("hyb", TrellisSpec(16, 2, 2), 3168),
    ("hyb", TrellisSpec(14, 2, 2), 6336),
    ("hyb", TrellisSpec(12, 2, 2), 8448),
    ("mul1", TrellisSpec(16, 2, 1), 1056),
)


def parity(name: str, spec: TrellisSpec) -> str:
    """Relative errors of values and gradients of 4 tiles at T = 0.05."""
    w = torch.randn(4, spec.steps(), spec.V, device="cuda")
    g = torch.randn_like(w)
    C = codebook(name, spec).cuda()
    results = []
    for dtype in (torch.float32, torch.float64):
        x = w.to(dtype).requires_grad_()
        values = bcjr(x, C.to(dtype), spec, temperature=0.05).values
        results.append((values.detach(), torch.autograd.grad(values, x, g.to(dtype))[0]))
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    return f"values {errors[0]:.1e}, grad {errors[1]:.1e}"


def seconds(function: object, repeats: int = 5) -> list[float]:
    """Sorted wall times."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()  # type: ignore[operator]
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])


def main() -> None:
    """Prints a line per case."""
    print(torch.cuda.get_device_name(), torch.__version__)
    for name, spec, tiles in CASES:
        print(name, spec, parity(name, spec), flush=True)
        C = codebook(name, spec).cuda()
        w = torch.randn(tiles, spec.steps(), spec.V, device="cuda", requires_grad=True)
        g = torch.randn_like(w)
        for T in (0.3, 0.05, 0.03):
            torch.cuda.reset_peak_memory_stats()
            found = seconds(
                lambda T=T: torch.autograd.grad(bcjr(w, C, spec, temperature=T).values, w, g)
            )
            each = [1e6 * t / tiles for t in found]
            print(
                f"  T={T}: forward + backward {statistics.median(each):.2f} us per tile "
                f"({each[0]:.2f} to {each[-1]:.2f}), {torch.cuda.max_memory_allocated() >> 20} MiB",
                flush=True,
            )
        x = w.detach()
        each = [1e6 * t / tiles for t in seconds(lambda: viterbi(x, C, spec))]
        print(f"  tail-biting Viterbi {statistics.median(each):.2f} us per tile", flush=True)


if __name__ == "__main__":
    main()
