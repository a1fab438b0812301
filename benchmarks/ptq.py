"""The rows of docs/ptq.md: a model quantized in several ways, and its perplexity.

    python benchmarks/ptq.py MODEL CALIBRATION_TEXT TEST_TEXT [ROW ...] [--seeds 0 1 2]

A row is what ``softtrellis quantize MODEL -o DIR --data CALIBRATION_TEXT --ctx 2048 --windows 128
--device cuda`` does with the options that the row's name stands for, which are printed.
Seconds are those of ``quantize_model``, Hessians included; the model is loaded once for all rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import time
from dataclasses import replace
from pathlib import Path

import torch

from softtrellis.cli.main import build_parser
from softtrellis.cli.quantize import configs
from softtrellis.evaluation.perplexity import score_windows
from softtrellis.io.sources import load_source
from softtrellis.io.text import load_documents, token_windows
from softtrellis.modules.replace import dequantize_, quantized_layers
from softtrellis.recipes.ptq import quantize_model

ROWS = {
    "2bit": "",
    "2bit-tuned": "--fine-tune",
    "2bit-tuned-whole": "--fine-tune --end-to-end 2",
    "2bit-outputs": "--output-windows 32",
    "2bit-tuned-outputs": "--fine-tune --output-windows 32",
    "2bit-tuned-outputs-whole": "--fine-tune --output-windows 32 --end-to-end 2",
    "3bit": "--bits 3 --code mul1",
    "4bit": "--bits 4 --code mul1",
    "2bit-quantized": "--inputs quantized",
    "2bit-original": "--inputs original",
    "2bit-no-hessian": "--no-hessian",
    "2bit-1mad": "--code 1mad",
    "2bit-3inst": "--code 3inst",
    "2bit-mul1": "--code mul1",
    "2bit-scalar": "--code scalar --L 8",
    "2bit-L14": "--L 14",
    "2bit-L12": "--L 12",
    "3bit-hyb": "--bits 3",
    "4bit-hyb": "--bits 4",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("rows", nargs="*", default=list(ROWS), help="names, or options of quantize")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--test-windows", type=int, help="by default all")
    parser.add_argument("--json", type=Path, help="add a line per result to this file")
    options = parser.parse_args()
    source = load_source(options.model)
    text = load_documents([options.test], split="heldout")
    test = token_windows(source.tokenizer, text, options.ctx, limit=options.test_windows)
    common = f"--data {shlex.quote(options.calibration)} --ctx {options.ctx} "
    common += f"--windows {options.windows} --device {options.device}"
    for row in options.rows:
        for seed in options.seeds:
            line = f"quantize {shlex.quote(options.model)} -o DIR {common} --seed {seed} "
            line += ROWS.get(row, row)
            parsed = build_parser().parse_args(shlex.split(line))
            config, fine_tune, progressive, end_to_end = configs(parsed)
            config = replace(config, show_progress=False)
            model = copy.deepcopy(source.model)
            began = time.perf_counter()
            quantize_model(
                model,
                config,
                tokenizer=source.tokenizer,
                fine_tune=fine_tune,
                progressive=progressive,
                end_to_end=end_to_end,
            )
            seconds = time.perf_counter() - began
            layers = quantized_layers(model).values()
            weights = sum(layer.in_features * layer.out_features for layer in layers)
            stored = [layer.stored_bits() for layer in layers]
            codes, scales = (sum(bits[part] for bits in stored) for part in ("codes", "scales"))
            dequantize_(model)
            scores = score_windows(model.to(options.device), test, batch_size=8)
            result = {
                "row": row,
                "seed": seed,
                "perplexity": scores.perplexity,
                "seconds": seconds,
                "code_bits": codes / weights,
                "bits": (codes + scales) / weights,
                "command": line,
            }
            bits = f"{codes / weights:.3f} bits, {(codes + scales) / weights:.3f} with scales"
            found = f"perplexity {scores.perplexity:8.2f}  {seconds:6.1f} s  {bits}"
            print(f"{row:18} seed {seed}  {found}", flush=True)
            if options.json is not None:
                with options.json.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            del model
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
