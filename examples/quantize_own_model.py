"""Quantize some layers of a model, train them, save a checkpoint, and compare on held-out text.

python examples/quantize_own_model.py smollm2-135m-instruct smollm2-2bit --layers 29 --steps 40
"""

from __future__ import annotations

import argparse
from pathlib import Path

from softtrellis import DistillConfig, QuantizeConfig, distill, load_quantized, quantize_model
from softtrellis.evaluation.divergence import paired_bootstrap
from softtrellis.evaluation.perplexity import score_windows
from softtrellis.io.checkpoint import base_of, save_quantized, size_report
from softtrellis.io.files import whole_directory
from softtrellis.io.sources import load_source
from softtrellis.io.text import load_documents, token_windows
from softtrellis.modules.replace import dequantize_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="hub id, directory, GGUF file, or smollm2-135m-instruct")
    parser.add_argument("output", type=Path, help="where ptq and qat go")
    parser.add_argument("--layers", default="29", help="with commas between them")
    parser.add_argument("--L", type=int, default=12, help="bits of a state")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="of calibration and evaluation")
    options = parser.parse_args()
    layers = tuple(options.layers.split(","))

    teacher = load_source(options.model)
    base = base_of(teacher)
    quantize = QuantizeConfig(
        L=options.L, layers=layers, ctx=options.ctx, windows=options.windows, show_progress=True
    )
    train = DistillConfig(steps=options.steps, batch=4, ctx=options.ctx, show_progress=True)

    # quantize_model and distill change a loaded model in place, so the student is loaded by name.
    student = quantize_model(options.model, quantize)
    with whole_directory(options.output / "ptq") as directory:
        save_quantized(student, teacher.tokenizer, directory, base=base)
    result = distill(student, train, teacher=teacher.model, tokenizer=teacher.tokenizer)
    with whole_directory(options.output / "qat") as directory:
        save_quantized(result.model, teacher.tokenizer, directory, base=base)

    documents = load_documents(["pydoc"], split="heldout")
    windows = token_windows(teacher.tokenizer, documents, options.ctx, limit=options.windows)
    scores = {}
    for name in ("ptq", "qat"):
        model = load_quantized(options.output / name)
        dequantize_(model)
        scores[name] = score_windows(model, windows, reference=teacher.model)
        bits = size_report(options.output / name).code_bits
        print(
            f"{name}: perplexity {scores[name].perplexity:.2f}, KL to the teacher "
            f"{scores[name].kl_mean:.4f} nats per token, {bits:.3f} bits per weight"
        )
    ptq, qat = scores["ptq"], scores["qat"]
    assert ptq.kl is not None
    assert qat.kl is not None
    found = paired_bootstrap(qat.kl / qat.tokens, ptq.kl / ptq.tokens, qat.tokens)
    interval = f"95% interval {found.low:+.4f} to {found.high:+.4f}"
    print(f"KL, qat less ptq: {found.mean:+.4f} nats per token ({interval})")


if __name__ == "__main__":
    main()
