"""Tokens per second at batch 1 of a Llama of random weights: packed at 2 bits, and in bf16.

    python benchmarks/bench_decode_model.py [--layers 32] [--context 1024] [--device cuda]

Llama-3.1-8B's shapes, a static cache of keys and values, greedy choice, one CUDA graph a token.
Embeddings, norms and the output layer are bf16 in both, and all that is not a linear layer is the
same code, compiled by ``torch.compile``: sums and norms are one kernel, rotary positions and the
cache another, attention over the whole cache a few. In bf16, layers of the same inputs (q, k, v;
gate, up) are one matrix, as inference engines have them; packed, they share the rotation of their
inputs and are one product (``JointLinear``; PTQ gives them the same signs), or not ("separate"),
as they are where every layer has scales of its own inputs and outputs ("trained").
The line "nothing" has no linear layers but the last: what the rest of a token takes.
``--early`` lets the glue's kernels, too, begin while the one before ends (torch's ``enable_pdl``).
``--device cpu`` is a trial of the script with small shapes, in which nothing is compiled.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bench_decode import captured

from softtrellis.modules.decode import DecodeBackend
from softtrellis.modules.joint_linear import JointLinear
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


Make = Callable[[int, tuple[int, ...]], nn.Module]
"""A module that gives the outputs of linear layers of these inputs and outputs."""


def normalised(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x + more
    return x, functional.rms_norm(x, (x.shape[-1],), weight)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-second, first], -1) * turn[1]


def attended(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor, turn: Tensor
) -> Tensor:
    """Attention of one token, whose key and value go to place ``at`` of the cache."""
    shared, context, width = keys.shape
    keys[:, at] = turned(k.view(shared, 1, width), turn)
    values[:, at] = v.view(shared, 1, width)
    scores = turned(q.view(shared, -1, width), turn) @ keys.mT
    later = torch.arange(context, device=keys.device) > at
    scores = (scores.float() * width**-0.5).masked_fill(later, float("-inf"))
    mean: Tensor = scores.softmax(-1).to(values.dtype) @ values
    return mean.view(1, -1)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def turn_at(at: Tensor, frequency: Tensor) -> Tensor:
    angle = at * torch.cat([frequency, frequency])
    return torch.stack([angle.cos(), angle.sin()]).bfloat16()


@dataclass(frozen=True)
class Glue:
    """All that is not a linear layer."""

    normalised: Callable[..., tuple[Tensor, Tensor]] = normalised
    attended: Callable[..., Tensor] = attended
    gated: Callable[..., Tensor] = gated
    turn_at: Callable[..., Tensor] = turn_at

    def compiled(self) -> Glue:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Glue(**{name: torch.compile(f, fullgraph=True) for name, f in parts.items()})


class Layer(nn.Module):
    norms: Tensor
    keys: Tensor
    values: Tensor

    def __init__(self, shape: Shape, context: int, make: Make, glue: Glue, device: str) -> None:
        super().__init__()
        self.glue = glue
        keys, queries = shape.shared_heads * shape.width, shape.heads * shape.width
        self.qkv = make(shape.hidden, (queries, keys, keys))
        self.o = make(queries, (shape.hidden,))
        self.gate_up = make(shape.hidden, (shape.inner, shape.inner))
        self.down = make(shape.inner, (shape.hidden,))
        ones = torch.ones(2, shape.hidden, device=device, dtype=torch.bfloat16)
        self.register_buffer("norms", ones)
        for name in ("keys", "values"):
            cache = torch.zeros(shape.shared_heads, context, shape.width, device=device)
            self.register_buffer(name, cache.bfloat16())

    def forward(self, x: Tensor, more: Tensor, at: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """The sum so far, and what is still to be added to it."""
        x, h = self.glue.normalised(x, more, self.norms[0])
        y = self.glue.attended(*self.qkv(h), self.keys, self.values, at, turn)
        x, h = self.glue.normalised(x, *self.o(y), self.norms[1])
        (more,) = self.down(self.glue.gated(*self.gate_up(h)))
        return x, more


class Model(nn.Module):
    def __init__(
        self, shape: Shape, layers: int, context: int, make: Make, glue: Glue, device: str
    ) -> None:
        super().__init__()
        self.glue = glue
        self.layers = nn.ModuleList(
            Layer(shape, context, make, glue, device) for _ in range(layers)
        )
        self.norm = torch.ones(shape.hidden, device=device, dtype=torch.bfloat16)
        draw = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=torch.bfloat16)
        self.embedding, self.head = draw * 0.02, draw.flip(0) * 0.02
        self.frequency = 5e5 ** (-torch.arange(0, 1, 2 / shape.width, device=device))

    def forward(self, token: Tensor, at: Tensor) -> Tensor:
        x = self.embedding[token]
        more, turn = torch.zeros_like(x), self.glue.turn_at(at, self.frequency)
        for layer in self.layers:
            x, more = layer(x, more, at, turn)
        _, x = self.glue.normalised(x, more, self.norm)
        return functional.linear(x, self.head).argmax(-1)


class Dense(nn.Module):
    """Linear layers of the same inputs as one bf16 matrix."""

    weight: Tensor

    def __init__(self, inputs: int, outputs: tuple[int, ...], device: str) -> None:
        super().__init__()
        self.outputs = outputs
        weight = torch.randn(sum(outputs), inputs, device=device, dtype=torch.bfloat16)
        self.register_buffer("weight", weight * inputs**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(functional.linear(x, self.weight).split(self.outputs, -1))


class Separate(nn.Module):
    """Packed layers, each by itself."""

    def __init__(self, layers: list[QuantizedLinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


class Nothing(nn.Module):
    """The first inputs as the outputs: no work, to see what the rest of a token takes."""

    def __init__(self, inputs: int, outputs: tuple[int, ...], device: str) -> None:
        super().__init__()
        outputs_of = torch.randn(sum(outputs), device=device, dtype=torch.bfloat16)
        self.result = tuple(outputs_of.unsqueeze(0).split(outputs, -1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.result


def stored_bytes(module: nn.Module) -> float:
    """Of a linear layer of this kind; 0 for other modules."""
    if isinstance(module, QuantizedLinear):
        return sum(module.stored_bits().values()) / 8
    return 2.0 * module.weight.numel() if isinstance(module, Dense) else 0.0


def packed(
    device: str, code: TrellisCode, backend: DecodeBackend, *, joint: bool, scales: bool
) -> Make:
    values = code.codebook()
    exl3 = code.order == "exl3"

    def layer(inputs: int, outputs: int, in_signs: Tensor) -> QuantizedLinear:
        form = LayerFormat(
            inputs, outputs, code, multiple=128 if exl3 else 16, block=128 if exl3 else None,
            in_scales=scales, channel_scales=scales,
        )  # fmt: skip
        layer = QuantizedLinear(form, values, backend).to(device)
        layer.codes.random_(-(1 << 15), 1 << 15)
        layer.in_signs.copy_(in_signs)
        layer.out_signs.random_(256)
        layer.scale.fill_(inputs**-0.5)
        if scales:
            layer.set_scales(layer.scale.new_ones(inputs), layer.scale.new_ones(outputs))
        if backend != "torch":
            layer.codebook = layer.codebook.new_empty(0)  # the kernels read the table only
        return layer

    def make(inputs: int, outputs: tuple[int, ...]) -> nn.Module:
        in_signs = torch.randint(256, (inputs // 8,), dtype=torch.uint8)
        layers = [layer(inputs, out, in_signs) for out in outputs]
        return JointLinear(layers) if joint else Separate(layers)

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
    parser.add_argument("--early", action="store_true")
    parser.add_argument("--ways", nargs="+", help="names of models, such as bf16")
    arguments = parser.parse_args()
    if arguments.early:
        if not hasattr(torch._inductor.config.triton, "enable_pdl"):
            sys.exit(f"PyTorch {torch.__version__} compiles no kernels that begin early")
        torch._inductor.config.triton.enable_pdl = True
    device, layers = arguments.device, arguments.layers
    torch.manual_seed(0)
    shape = Shape() if device == "cuda" else Shape(128, 384, 4, 2, 32, 256)
    glue = Glue().compiled() if device == "cuda" else Glue()
    ways: dict[str, Make] = {
        "bf16": partial(Dense, device=device),
        "nothing": partial(Nothing, device=device),
    }
    if device == "cuda":
        for name in CODES:
            ways[f"{name}, cuda"] = packed(device, CODES[name], "cuda", joint=True, scales=False)
    for label, scales in (("separate", False), ("trained", True)):
        backend: DecodeBackend = "cuda" if device == "cuda" else "torch"
        make = packed(device, CODES["hyb"], backend, joint=False, scales=scales)
        ways[f"hyb, {backend}, {label}"] = make
    first = 0.0
    for name in arguments.ways or ways:
        make = ways[name]
        model = Model(shape, layers, arguments.context, make, glue, device)
        weights = sum(map(stored_bytes, model.modules()))
        speed = tokens_per_second(model, min(200, arguments.context - 16), device)
        first = first or speed
        print(f"{name}: {speed:.1f} tokens a second ({speed / first:.2f}x), "
              f"{1e3 / speed:.3f} ms a token, {weights / 2**30:.2f} GiB in the layers",
              flush=True)  # fmt: skip
        del model
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
