"""Time and memory of a joint training step, with random weights of a model's shapes.

    python benchmarks/bench_step.py [smollm2-135m | llama-3.2-1b | llama-3.1-8b] [--estimator soft]

Prints the seconds of each part of a step over all linear layers, and the peak of the memory.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from softtrellis.modules.latent_linear import hold, release
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.modules.replace import get_linear, linear_names, replace_modules
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.recipes.qat import NEAR_START, DistillConfig
from softtrellis.recipes.trainer import Trainer
from softtrellis.spec import TrellisSpec

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


def random_codes_(model: Any, L: int, device: str) -> list[str]:
    """Puts HYB of random codes in the place of a Llama's linear layers; their names."""
    code = TrellisCode(TrellisSpec(L, 2, 2))
    codebook = code.codebook().to(device)
    names = linear_names(model)

    def quantized(name: str, _: Any) -> QuantizedLinear:
        linear = get_linear(model, name)
        layer = LayerFormat(linear.in_features, linear.out_features, code)
        made = QuantizedLinear(layer, codebook).to(device)
        made.codes.random_(-(1 << 15), 1 << 15)
        made.in_signs.random_(0, 256)
        made.out_signs.random_(0, 256)
        made.scale.fill_(float(linear.weight.detach().square().mean().sqrt()))
        return made

    replace_modules(model, names, quantized)
    return names


def random_llama(shape: str, device: str) -> Any:
    """In float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    return model.train(mode=False)


def models(shape: str, L: int, device: str) -> tuple[Any, Any, list[str]]:
    """A random teacher, a student of random codes, and the names of its quantized layers."""
    teacher, student = random_llama(shape, device), random_llama(shape, device)
    return teacher, student, random_codes_(student, L, device)


def step_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a measured step."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--L", type=int, default=16)
    parser.add_argument("--estimator", default="soft")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--checkpoint-layers", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--viterbi-every", type=int, default=1)
    parser.add_argument("--train", default="latents", help="as in softtrellis train")
    return parser


def step_config(options: argparse.Namespace, **more: Any) -> DistillConfig:
    """A run that only trains, with these options."""
    return DistillConfig(
        estimator=options.estimator,
        start=NEAR_START,
        t_init=options.temperature,
        t_min=options.temperature,
        batch=options.batch,
        micro_batch=options.micro_batch,
        ctx=options.ctx,
        checkpoint_layers=options.checkpoint_layers,
        compile=options.compile,
        cuda_graphs=options.cuda_graphs,
        viterbi_every=options.viterbi_every,
        train=tuple(options.train.split(",")),
        measure_every=0,
        held_out=0,
        device=options.device,
        **more,
    )


def main() -> None:
    parser = step_parser(__doc__)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="one more step, by operations")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    teacher, student, names = models(options.shape, options.L, options.device)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(vocabulary, (64, options.ctx), generator=generator)
    config = step_config(options, optimizer=options.optimizer)
    trainer = Trainer(student, teacher, names, windows, windows[:0], config)
    layers = list(trainer.layers.values())
    weights = sum(layer.latent.numel() for layer in layers)
    print(f"{options.shape}: {weights:,} weights, {len(layers)} layers, {options.estimator}")

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for step in range(options.steps):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        began = now()
        trainer.step(step, 0.5)
        seconds = now() - began
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        print(f"step {step}: {seconds:.3f} s, {peak:.1f} GiB", flush=True)
    began = now()
    hold(layers)
    held = now()
    for layer in layers:
        if layer.held is not None and layer.held.requires_grad:
            layer.held.grad = torch.randn_like(layer.held)
    filled = now()
    release(layers)
    released = now()
    trainer.optimizer.step()
    updated = now()
    print(
        f"weights {held - began:.3f} s, their gradients {released - filled:.3f} s, "
        f"optimizer {updated - released:.3f} s",
        flush=True,
    )
    trainer.optimizer.zero_grad()
    if options.profile:
        profile_step(trainer, options.steps, cuda=cuda)


def profile_step(trainer: Trainer, step: int, *, cuda: bool) -> None:
    """Prints what one step spends its time on: on the device, and where the CPU holds it up."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        trainer.step(step, 0.5)
        if cuda:
            torch.cuda.synchronize()
    averages = found.key_averages()
    orders = ("self_cuda_time_total", "self_cpu_time_total") if cuda else ("self_cpu_time_total",)
    for order in orders:
        print(averages.table(sort_by=order, row_limit=30, max_name_column_width=60))


if __name__ == "__main__":
    main()
