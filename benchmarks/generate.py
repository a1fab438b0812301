"""Tokens per second and memory of a checkpoint, packed and dense: they must give the same tokens.

python benchmarks/generate.py smollm2-2bit --device cuda --dtype bfloat16

On a GPU first run the tests: python -m pytest -m gpu tests/integrations
"""

from __future__ import annotations

import argparse
import time

import torch

from softtrellis.io.checkpoint import LoadConfig, load_quantized, load_tokenizer
from softtrellis.modules.replace import hold_weights_
from softtrellis.recipes.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    cuda = torch.device(options.device).type == "cuda"

    model = load_quantized(options.checkpoint, LoadConfig(options.device, dtype=dtype))
    tokenizer = load_tokenizer(options.checkpoint)
    ids = tokenizer(options.prompt, return_tensors="pt")["input_ids"].to(options.device)
    print(environment())
    found = {}
    for weights in ("packed", "dense"):
        if weights == "dense":
            hold_weights_(model, dtype)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(options.repeats + 1):
            start = time.perf_counter()
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=options.tokens,
                max_new_tokens=options.tokens,
                do_sample=False,
                pad_token_id=0,
            )
            found[weights] = output.tolist()  # waits for the device
            seconds.append(time.perf_counter() - start)
        warm = sorted(seconds[1:])
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        print(
            f"{weights}: {options.tokens / warm[len(warm) // 2]:.2f} tokens per second (median of "
            f"{len(warm)}; {options.tokens / warm[-1]:.2f} to {options.tokens / warm[0]:.2f}), "
            f"model {model.get_memory_footprint():,} bytes, peak {peak:,} bytes"
        )
    print("same tokens" if found["packed"] == found["dense"] else "DIFFERENT TOKENS")
    print(tokenizer.decode(found["packed"][0]))


if __name__ == "__main__":
    main()
