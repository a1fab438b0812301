"""Tokens per second at batch 1 of a Llama of random weights: packed at 2 bits, and in bf16.

    python benchmarks/bench_decode_model.py [--layers 32] [--context 1024] [--device cuda]

Llama-3.1-8B's shapes, a static cache of keys and values, greedy choice, one CUDA graph a token.
Embeddings, norms and the output layer are bf16 in both. ``--device cpu`` is a trial of the script
with small shapes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bench_decode import captured

from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TrellisSpec

CODES = {
    "hyb": TrellisCode(TrellisSpec(16, 2, 2), "hyb"),
    "mul1": TrellisCode(TrellisSpec(16, 2, 1), "mul1", normalize=False, order="exl3"),
}


@dataclass(frozen=True)
class Shape:
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    shared_heads: int = 8
    width: int = 128
    vocabulary: int = 128256


Make = Callable[[int, int], nn.Module]


class Layer(nn.Module):
    def __init__(self, shape: Shape, context: int, make: Make, device: str) -> None:
        super().__init__()
        self.shape = shape
        keys = shape.shared_heads * shape.width
        queries = shape.heads * shape.width
        self.q, self.k, self.v = (make(shape.hidden, n) for n in (queries, keys, keys))
        self.o = make(queries, shape.hidden)
        self.gate, self.up = make(shape.hidden, shape.inner), make(shape.hidden, shape.inner)
        self.down = make(shape.inner, shape.hidden)
        ones = torch.ones(2, shape.hidden, device=device, dtype=torch.bfloat16)
        self.register_buffer("norms", ones)
        cache = torch.zeros(
            2, 1, shape.shared_heads, context, shape.width, device=device, dtype=torch.bfloat16
        )
        self.register_buffer("cache", cache)

    def forward(self, x: Tensor, at: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
        size = (self.shape.hidden,)
        h = functional.rms_norm(x, size, self.norms[0])
        q, k, v = (m(h).view(1, -1, 1, self.shape.width) for m in (self.q, self.k, self.v))
        self.cache[0].index_copy_(2, at, rotate(k, turn))
        self.cache[1].index_copy_(2, at, v)
        y = functional.scaled_dot_product_attention(
            rotate(q, turn), self.cache[0], self.cache[1], attn_mask=mask, enable_gqa=True
        )
        x = x + self.o(y.reshape(1, -1))
        h = functional.rms_norm(x, size, self.norms[1])
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-second, first], -1) * turn[1]


class Model(nn.Module):
    def __init__(self, shape: Shape, layers: int, context: int, make: Make, device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape, context, make, device) for _ in range(layers))
        self.norm = torch.ones(shape.hidden, device=device, dtype=torch.bfloat16)
        draw = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=torch.bfloat16)
        self.embedding, self.head = draw * 0.02, draw.flip(0) * 0.02
        frequency = 5e5 ** (-torch.arange(0, 1, 2 / shape.width, device=device))
        self.angle = torch.cat([frequency, frequency])
        self.places = torch.arange(context, device=device)

    def forward(self, token: Tensor, at: Tensor) -> Tensor:
        x = self.embedding[token]
        angle = at * self.angle
        turn = torch.stack([angle.cos(), angle.sin()]).bfloat16()
        mask = (self.places <= at).view(1, 1, 1, -1)
        for layer in self.layers:
            x = layer(x, at, turn, mask)
        x = functional.rms_norm(x, (x.shape[-1],), self.norm)
        return functional.linear(x, self.head).argmax(-1)


def dense(device: str) -> Make:
    def make(inputs: int, outputs: int) -> nn.Module:
        layer = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)
        nn.init.normal_(layer.weight, std=inputs**-0.5)
        return layer

    return make


def packed(device: str, code: TrellisCode, backend: str) -> Make:
    codebook = code.codebook()
    exl3 = code.order == "exl3"

    def make(inputs: int, outputs: int) -> nn.Module:
        form = LayerFormat(
            inputs, outputs, code, multiple=128 if exl3 else 16, block=128 if exl3 else None
        )
        layer = QuantizedLinear(form, codebook, backend).to(device)  # type: ignore[arg-type]
        layer.codes.random_(-(1 << 15), 1 << 15)
        layer.in_signs.random_(256)
        layer.out_signs.random_(256)
        layer.scale.fill_(inputs**-0.5)
        layer.codebook = layer.codebook.new_empty(0)  # the kernels read the table only
        return layer

    return make


@torch.no_grad()
def tokens_per_second(model: Model, steps: int, device: str) -> float:
    token = torch.zeros(1, dtype=torch.int64, device=device)
    at = torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> None:
        token.copy_(model(token, at))
        at.add_(1)

    if device == "cpu":
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return steps / (time.perf_counter() - start)
    graph = captured(step)
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        graph.replay()
    torch.cuda.synchronize()
    return steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    device, layers = arguments.device, arguments.layers
    torch.manual_seed(0)
    shape = Shape() if device == "cuda" else Shape(128, 384, 4, 2, 32, 256)
    ways = {"bf16": dense(device)}
    if device == "cuda":
        ways |= {
            f"{name}, {backend}": packed(device, CODES[name], backend)
            for name, backend in (("hyb", "cuda"), ("mul1", "cuda"), ("hyb", "triton"))
        }
    first = 0.0
    for name, make in ways.items():
        model = Model(shape, layers, arguments.context, make, device)
        weights = sum(
            t.numel() * t.element_size()
            for layer in model.layers
            for key, t in (*layer.named_parameters(), *layer.named_buffers())
            if not key.startswith(("cache", "norms"))
        )
        speed = tokens_per_second(model, min(200, arguments.context - 16), device)
        first = first or speed
        print(f"{name}: {speed:.1f} tokens a second ({speed / first:.2f}x), "
              f"{weights / 2**30:.2f} GiB in the layers", flush=True)  # fmt: skip
        del model
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
