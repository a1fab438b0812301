"""Time to quantize one decoder layer of Llama-3.1-8B's shapes (random weights and tokens).

    python benchmarks/bench_ptq_layer.py [--device cuda] [--windows 128] [--repeats 3]

Prints the seconds from the weights to the finished layer, Hessians and the pass that the next layer
needs included, and the peak of the device's memory.
"""

from __future__ import annotations

import argparse
import time

import torch

from softtrellis.recipes.block_ptq import BlockQuantizer
from softtrellis.recipes.ptq import QuantizeConfig
from softtrellis.recipes.ptq_state import LayerStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--L", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=1,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=options.hidden // 512,
    )
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(1024, (options.windows, options.ctx), generator=generator)
    settings = QuantizeConfig(L=options.L, ctx=options.ctx, device=options.device)
    for repeat in range(options.repeats):
        torch.manual_seed(repeat)
        model = LlamaForCausalLM(config)
        model.train(mode=False)
        names = settings.names_of(model)
        if options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        quantizer = BlockQuantizer(
            model, names, windows, settings, None, LayerStore(None, {}, resume=False)
        )
        ready = time.perf_counter()
        quantizer.run()
        if options.device == "cuda":
            torch.cuda.synchronize()
        done = time.perf_counter()
        peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else 0.0
        encoding = sum(report.seconds for report in quantizer.reports.values())
        print(
            f"{done - began:.2f} s in all: {ready - began:.2f} s to see how the model calls its "
            f"layers, {encoding:.2f} s of LDLQ; {peak:.1f} GiB at most",
            flush=True,
        )
        del model, quantizer  # or the next repeat's peak would hold them too


if __name__ == "__main__":
    main()
