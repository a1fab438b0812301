"""Hard and soft trellis quantization of random weights: error, bits, and the effect of temperature.

python examples/soft_quantize.py --L 12 --tiles 16
"""

from __future__ import annotations

import argparse

import torch

from softtrellis import TrellisSpec, bcjr, codebook, pack, unpack, viterbi


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--L", type=int, default=12, help="bits of a state, 10 to 16")
    parser.add_argument("--tiles", type=int, default=16, help="tiles of 256 weights")
    options = parser.parse_args()

    spec = TrellisSpec(L=options.L, k=2, V=2)
    C = codebook("hyb", spec)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(options.tiles, spec.steps(256), spec.V, generator=generator)

    path = viterbi(w, C, spec, ends="tail_biting")
    words = pack(path.states, spec)
    assert torch.equal(unpack(words, spec, steps=spec.steps(256)), path.states)
    print(f"{spec.num_states} states, {words.numel() * 16 / w.numel():.3f} bits per weight")
    print(f"hard code: mean squared error {path.cost.sum() / w.numel():.4f}")

    # Both ends pinned to the hard code's overlap, so that T to 0 leads back to it.
    pins = path.states[:, 0] >> (spec.k * spec.V)
    print("\n    T   error   distance to the hard code   entropy per step")
    for temperature in (1.0, 0.3, 0.1, 0.03, 0.01):
        soft = bcjr(w, C, spec, temperature=temperature, ends=pins, return_entropy=True)
        assert soft.entropy is not None
        error = (soft.values - w).square().mean()
        gap = (soft.values - path.values).square().mean().sqrt()
        print(f"{temperature:5}  {error:.4f}   {gap:25.4f}   {soft.entropy.mean():11.3f} nats")

    # The gradient is exact: it predicts what a small step in any direction does.
    w.requires_grad_()
    direction = torch.randn(w.shape, generator=generator)
    loss = bcjr(w, C, spec, temperature=0.3, ends=pins).values.pow(4).mean()
    (gradient,) = torch.autograd.grad(loss, w)
    step = 1e-2
    with torch.no_grad():
        ahead, behind = (
            bcjr(w + sign * step * direction, C, spec, temperature=0.3, ends=pins)
            .values.pow(4)
            .mean()
            for sign in (1, -1)
        )
    slope = (gradient * direction).sum()
    print(f"\nslope along a random direction: {slope:.4f} by the gradient,", end=" ")
    print(f"{(ahead - behind) / (2 * step):.4f} by a finite difference")


if __name__ == "__main__":
    main()
