"""Train LoRA adapters on a packed checkpoint, save them, load them again, and compare.

softtrellis quantize smollm2-135m-instruct -o smollm2-2bit --layers 29 --L 12
python examples/lora.py smollm2-2bit adapter --steps 20

Needs peft: .venv/bin/pip install -e '.[lora]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig

from softtrellis import load_quantized
from softtrellis.evaluation.perplexity import score_windows
from softtrellis.integrations.peft import add_lora, load_lora
from softtrellis.io.checkpoint import CheckpointError, load_tokenizer, read_manifest
from softtrellis.io.text import load_documents, token_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="of softtrellis")
    parser.add_argument("output", type=Path, help="where the adapters go")
    parser.add_argument("--data", nargs="+", default=["pydoc"], help="texts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--ctx", type=int, default=128)
    parser.add_argument("--windows", type=int, default=16, help="of evaluation")
    options = parser.parse_args()
    try:
        read_manifest(Path(options.checkpoint))
    except CheckpointError as error:
        parser.error(str(error))

    tokenizer = load_tokenizer(options.checkpoint)
    texts = {split: load_documents(options.data, split=split) for split in ("train", "heldout")}
    train = token_windows(tokenizer, texts["train"], options.ctx, limit=2 * options.steps)
    heldout = token_windows(tokenizer, texts["heldout"], options.ctx, limit=options.windows)

    model = load_quantized(options.checkpoint)
    before = score_windows(model, heldout).perplexity
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, task_type="CAUSAL_LM")
    adapted = add_lora(model, config)
    adapted.print_trainable_parameters()
    adapters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=options.lr)
    for step, batch in enumerate(train.split(2), 1):
        loss = adapted(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")
    adapted.save_pretrained(str(options.output))

    loaded = load_lora(load_quantized(options.checkpoint), options.output)
    after = score_windows(loaded.get_base_model(), heldout).perplexity
    print(f"held-out perplexity {before:.3f}, with the adapters {after:.3f}")


if __name__ == "__main__":
    main()
