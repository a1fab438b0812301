"""Tokens per second and memory of generation in transformers, packed and dense.

python benchmarks/generate.py smollm2-2bit --device cuda --dtype bfloat16
python benchmarks/generate.py llama-3.1-8b --device cuda --dtype bfloat16 --cache static

Of a checkpoint, whose tokens must be the same both ways where they are computed in float32, or of
random codes of a model's shapes (``bench_step.SHAPES``). With a static cache transformers compiles
the model on a GPU. First run the tests: python -m pytest -m gpu tests/integrations
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bench_step import SHAPES, random_codes_, random_llama

from softtrellis.io.checkpoint import LoadConfig, load_quantized, load_tokenizer
from softtrellis.modules.replace import cast_, hold_weights_
from softtrellis.recipes.environment import environment


def random_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """With random codes of HYB at L = 16, in this dtype where it is not packed."""
    model = random_llama(shape, device)
    random_codes_(model, 16, device)
    cast_(model, dtype)
    return model


def tokens_per_second(model: Any, ids: Tensor, options: argparse.Namespace) -> list[list[int]]:
    """Prints them, and the memory; the tokens."""
    seconds, found = [], []
    for _ in range(options.repeats + 2):
        start = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=options.tokens,
            max_new_tokens=options.tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=options.cache,
        )
        found = output.tolist()  # waits for the device
        seconds.append(time.perf_counter() - start)
    warm = sorted(seconds[2:])
    print(
        f"{options.tokens / warm[len(warm) // 2]:.2f} tokens per second (median of {len(warm)}; "
        f"{options.tokens / warm[-1]:.2f} to {options.tokens / warm[0]:.2f}), "
        f"model {model.get_memory_footprint():,} bytes"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help=f"a folder, or one of {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache", choices=["dynamic", "static"], default="dynamic")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.checkpoint in SHAPES:
        model, tokenizer = random_model(options.checkpoint, options.device, dtype), None
        ids = torch.arange(1, 7, device=options.device).unsqueeze(0)
    else:
        model = load_quantized(options.checkpoint, LoadConfig(options.device, dtype=dtype))
        tokenizer = load_tokenizer(options.checkpoint)
        ids = tokenizer(options.prompt, return_tensors="pt")["input_ids"].to(options.device)
    print(environment())
    print("packed: ", end="")
    packed = tokens_per_second(model, ids, options)
    hold_weights_(model, dtype)
    torch.compiler.reset()
    print("dense: ", end="")
    dense = tokens_per_second(model, ids, options)
    print("same tokens" if packed == dense else "different tokens")
    if tokenizer is not None:
        print(tokenizer.decode(packed[0]))


if __name__ == "__main__":
    main()
