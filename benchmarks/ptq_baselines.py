"""What rotation, LDLQ and the trellis each bring: perplexities of one model, quantized all ways.

    python benchmarks/ptq_baselines.py MODEL CALIBRATION_TEXT TEST_TEXT [--device cuda] [ROW ...]

Rows are QUANTIZER-ROTATION-FEEDBACK: scalar (Lloyd-Max, 2 bits) or hyb; rht or none; ldlq or plain.
Weights are replaced by their reproductions, decoder layer by decoder layer, each seeing what the
quantized ones before it give; nothing is packed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from softtrellis.evaluation.perplexity import score_windows
from softtrellis.io.progress import progress
from softtrellis.io.sources import load_source
from softtrellis.io.text import load_documents, token_windows
from softtrellis.modules.blocks import Blocks
from softtrellis.quantizers.basis import WeightBasis
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.quantizers.ldlq import block_ldl, ldlq
from softtrellis.recipes.calibration import watch_inputs
from softtrellis.spec import TrellisSpec
from softtrellis.transforms.incoherence import Incoherence

ROWS = [
    *("scalar-none-plain", "scalar-none-ldlq", "scalar-rht-plain", "scalar-rht-ldlq"),
    *("hyb-none-plain", "hyb-none-ldlq", "hyb-rht-plain", "hyb-rht-ldlq"),
]


def quantizer(name: str, L: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Latent columns [out, n] to their reproduction, in units of their standard deviation."""
    spec = TrellisSpec(8, 2, 1) if name == "scalar" else TrellisSpec(L, 2, 2)
    code = TrellisCode(spec, name)
    values = code.codebook().to(device)
    return lambda columns: code.decode(code.encode(columns, values), values, *columns.shape)


def basis_of(weight: Tensor, rotation: str) -> WeightBasis:
    """The rotated basis, or the weight's own; one scale for the matrix."""
    rows, columns = weight.shape
    incoherence = Incoherence.random(columns, rows, seed=0, block=1 if rotation == "none" else None)
    if rotation == "none":
        signs = (torch.ones_like(incoherence.in_signs), torch.ones_like(incoherence.out_signs))
        incoherence = replace(incoherence, in_signs=signs[0], out_signs=signs[1])
    incoherence = incoherence.to(weight.device)
    return WeightBasis.fit(weight, incoherence, sigma=1.0, channel_scales=False)


@torch.no_grad()
def quantize(model: nn.Module, windows: Tensor, row: str, L: int, device: torch.device) -> None:
    name, rotation, feedback = row.split("-")
    encode = quantizer(name, L, device)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    blocks = Blocks(model, windows, device=device, batch=4, autocast=autocast)
    states = blocks.states
    for index in progress(range(len(blocks.layers)), row):
        with blocks.on_device(index) as layer:
            linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
            moments, _ = watch_inputs(blocks, index, states, linears, linears)
            for path, linear in linears.items():
                weight = linear.weight.float()
                basis, hessian = basis_of(weight, rotation), moments.hessian(path)
                latent = basis.to_latent(weight)
                if feedback == "ldlq" and hessian is not None:
                    found = ldlq(latent, block_ldl(basis.rotate_hessian(hessian), 0.01), encode)
                else:
                    found = encode(latent)
                linear.weight.copy_(basis.to_weight(found))
            states = blocks.run_all(index, states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("rows", nargs="*", default=ROWS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--L", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--test-windows", type=int)
    options = parser.parse_args()
    device = torch.device(options.device)
    for row in options.rows:
        source = load_source(options.model)
        texts = (
            (load_documents([options.calibration], split="calibration"), options.windows),
            (load_documents([options.test], split="heldout"), options.test_windows),
        )
        calibration, test = (
            token_windows(source.tokenizer, text, options.ctx, limit=limit) for text, limit in texts
        )
        began = time.perf_counter()
        quantize(source.model, calibration, row, options.L, device)
        seconds = time.perf_counter() - began
        model: nn.Module = source.model
        scores = score_windows(model.to(device), test)
        print(f"{row:20} perplexity {scores.perplexity:8.2f}  {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
