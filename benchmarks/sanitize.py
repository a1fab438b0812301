"""A small case of every GPU kernel, for compute-sanitizer.

    compute-sanitizer --report-api-errors no --tool memcheck python benchmarks/sanitize.py cuda

and so on with racecheck. The API errors left out are cuda-bindings asking the driver for functions
that it does not have.
"""

from __future__ import annotations

import argparse

import torch

from softtrellis import TrellisSpec, bcjr, codebook, viterbi
from softtrellis.trellis.bcjr import pass_back

CASES = [
    ("hyb", TrellisSpec(16, 2, 2), 9),
    ("mul1", TrellisSpec(16, 2, 1), 16),
    ("hyb", TrellisSpec(12, 2, 2), 9),
]
SMALL = [("gaussian", TrellisSpec(8, 2, 2), 9), ("gaussian", TrellisSpec(8, 2, 1), 9)]


def run(code: str, spec: TrellisSpec, steps: int, backend: str) -> None:
    C = codebook(code, spec).cuda()
    w = torch.randn(3, steps, spec.V, device="cuda")
    w[0, 1] = 7.0
    pins = torch.tensor([0, 1, spec.num_overlaps - 1], device="cuda")
    for ends in ("free", pins):
        x = w.clone().requires_grad_()
        soft = bcjr(x, C, spec, temperature=0.05, ends=ends, backend=backend)  # type: ignore[arg-type]
        (soft.values.square().sum() + soft.log_z.sum()).backward()
        assert x.grad is not None
        assert bool(torch.isfinite(x.grad).all())
        hard = viterbi(w, C, spec, ends=ends, backend=backend).values  # type: ignore[arg-type]
        passed = pass_back(hard, x, C, spec, temperature=0.05, ends=ends, backend=backend)  # type: ignore[arg-type]
        passed.square().sum().backward()
    for ends in ("free", pins, "tail_biting"):
        viterbi(w, C, spec, ends=ends, backend=backend)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=["cuda", "triton"])
    options = parser.parse_args()
    for code, spec, steps in CASES if options.backend == "cuda" else SMALL:
        run(code, spec, steps, options.backend)
        print(code, spec, "done")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
