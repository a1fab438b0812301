"""Mean squared error of tail-biting codes on N(0, 1), with stretched codebooks.

    python benchmarks/code_scales.py [--tiles 64] [--L 16] [--seed 0]

The factor of least error is what ``TrellisCode.sigma`` divides by.
"""

from __future__ import annotations

import argparse

import torch

from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TrellisSpec

FACTORS = (0.9, 0.95, 1.0, 1.03, 1.06, 1.1, 1.15, 1.2, 1.25, 1.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=64)
    parser.add_argument("--L", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    weight = torch.randn(16, 16 * options.tiles, generator=generator)
    print(f"{'code':8} k  " + "  ".join(f"{factor:7.2f}" for factor in FACTORS))
    for name in ("hyb", "mul1", "mcg", "3inst", "1mad"):
        for k in range(1, 5):
            code = TrellisCode(TrellisSpec(options.L, k, 2 if name == "hyb" else 1), name)
            values = code.codebook()
            errors = []
            for factor in FACTORS:
                states = code.encode(weight / factor, values)
                found = code.decode(states, values, *weight.shape) * factor
                errors.append(float((found - weight).square().mean()))
            print(f"{name:8} {k}  " + "  ".join(f"{error:7.5f}" for error in errors), flush=True)


if __name__ == "__main__":
    main()
