"""What every rank runs in tests/recipes/test_sharded_layers.py, under torchrun."""

from __future__ import annotations

import copy
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import tiny_model, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softtrellis.modules.latent_linear import LatentLinear, hold, release
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.modules.replace import prepare_for_layers_, replace_modules, select_layers
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.recipes.group import quantize_linear
from softtrellis.recipes.qat import DistillConfig, distill
from softtrellis.recipes.ranks import ONE, Ranks, join
from softtrellis.recipes.sharded_layers import ShardedLayers
from softtrellis.spec import TrellisSpec

CODE = TrellisCode(TrellisSpec(8, 2, 2), "gaussian")


class Block(nn.Module):
    """Some experts, of which a pass may call a part, beside the hidden states."""

    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        shapes = [(width, inner), (inner, width)]
        self.experts = nn.ModuleList(
            nn.ModuleList(nn.Linear(*shape, bias=False) for shape in shapes) for _ in range(experts)
        )

    def forward(self, hidden: Tensor, chosen: list[int]) -> Tensor:
        for index in chosen:
            up, down = self.experts[index]
            hidden = hidden + down(torch.tanh(up(hidden)))
        return hidden


class Student(nn.Module):
    def __init__(self, depth: int, width: int, inner: int, experts: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, inner, experts) for _ in range(depth))
        self.names = [name for name, module in self.named_modules() if type(module) is nn.Linear]
        replace_modules(self, self.names, random_code)

    def forward(self, hidden: Tensor, chosen: list[int]) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, chosen)
        return hidden


def random_code(name: str, linear: nn.Module) -> QuantizedLinear:
    assert isinstance(linear, nn.Linear)
    layer = LayerFormat(linear.in_features, linear.out_features, CODE)
    made = QuantizedLinear(layer, CODEBOOK)
    made.codes.random_(-(1 << 15), 1 << 15)
    made.in_signs.random_(0, 256)
    made.out_signs.random_(0, 256)
    made.scale.fill_(0.3)
    return made


CODEBOOK = CODE.codebook()


def hard_code(name: str, linear: nn.Module) -> QuantizedLinear:
    assert isinstance(linear, nn.Linear)
    layer = LayerFormat(linear.in_features, linear.out_features, CODE)
    bias = None if linear.bias is None else linear.bias.detach()
    return quantize_linear(linear.weight.detach(), None, layer, CODEBOOK, bias=bias)[0]


def latents(
    student: Student, ranks: Ranks, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, LatentLinear], ShardedLayers | None]:
    """The student's training layers, spread over the ranks if there are several."""
    made: dict[str, LatentLinear] = {}

    def make(name: str, module: nn.Module) -> LatentLinear:
        assert isinstance(module, QuantizedLinear)
        made[name] = LatentLinear.from_quantized(module, temperature=0.3, mesh=ranks.mesh)
        made[name].train_scales()
        return made[name]

    sharded = None
    if ranks.size > 1:
        sharded = ShardedLayers(student, student.names, ranks, dtype=dtype)
    for index in range(len(student.layers)):
        names = [name for name in student.names if name.startswith(f"layers.{index}.")]
        replace_modules(student, names, make)
        if sharded is not None:
            sharded.shard()
    return made, sharded


def gradients(
    ranks: Ranks, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5
) -> dict[str, bool]:
    """Shards, outputs and gradients, against one process that runs all ranks' passes."""
    passes = [[(rank + i) % 3 for i in range(1 + rank % 2)] for rank in range(ranks.size)]
    assert all(3 not in chosen for chosen in passes)  # no rank calls the last one
    inputs = torch.randn(ranks.size, 2, 5, 16)  # two parts of a batch
    student = Student(2, 16, 80, experts=4)
    found, sharded = latents(copy.deepcopy(student), ranks, dtype)
    expected, _ = latents(student, ONE)
    assert sharded is not None
    for name, layer in found.items():
        assert layer.share is not None
        assert layer.codewords is not None
        own = CODEBOOK[expected[name].start.long()][layer.share.owned]
        assert torch.equal(layer.share.local(layer.codewords), own)
        assert layer.latent.shape == own.shape
    hold(found.values())
    hold(expected.values())
    for part in inputs.unbind(1):
        for rank, x in enumerate(part):
            student(x, passes[rank]).square().sum().backward()
        run = chain(sharded._units, passes[ranks.rank])
        sharded(run, part[ranks.rank]).square().sum().backward()
    release(found.values())
    release(expected.values())
    same: dict[str, bool] = {}
    for name, layer in found.items():
        wanted = expected[name]
        same[name] = close(layer.latent.grad, layer.own(whole(wanted.latent)), tolerance)
        assert layer.in_scale is not None
        assert wanted.in_scale is not None
        scale = whole(layer.in_scale)
        ranks.sum_([scale])
        same[f"{name}.in_scale"] = close(scale, whole(wanted.in_scale), tolerance)
    sharded.undo()
    return same


def whole(parameter: nn.Parameter) -> Tensor:
    """The gradient, with zeros for none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def close(found: Tensor | None, expected: Tensor, tolerance: float) -> bool:
    return found is not None and bool((found - expected).norm() <= tolerance * expected.norm())


def chain(layers: nn.ModuleList, chosen: list[int]) -> Callable[[Tensor], Tensor]:
    def run(hidden: Tensor) -> Tensor:
        for layer in layers:
            hidden = layer(hidden, chosen)
        return hidden

    return run


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations made while it is entered, and still lives."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[Any]] = {}
        self.peak = 0

    def now(self) -> int:
        alive = {key: made for key, ref in self._made.items() if (made := ref()) is not None}
        self._made = {key: self._made[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is Tensor:
                storage = tensor.untyped_storage()
                self._made.setdefault(id(storage), weakref.ref(storage))
        self.peak = max(self.peak, self.now())
        return result


def memory(ranks: Ranks) -> dict[str, float]:
    """Bytes per weight of a further decoder layer: after ``hold``, and at the peak of the passes.

    The codewords that passes take are written to in ``hold`` and count; latents do not.
    """
    width, shallow, deep = 64, 3, 9
    (few_held, few_peak), (held, peak) = (live_bytes(ranks, width, n) for n in (shallow, deep))
    weights = (deep - shallow) * 2 * width * width
    return {"held": (held - few_held) / weights, "peak": (peak - few_peak) / weights}


def live_bytes(ranks: Ranks, width: int, depth: int) -> tuple[int, int]:
    layers, sharded = latents(Student(depth, width, width), ranks)
    assert sharded is not None
    run = chain(sharded._units, [0])
    for _ in range(2):  # the first one sets up what stays
        with LiveBytes() as counted:
            hold(layers.values())
            held, counted.peak = counted.now(), 0
            for _ in range(2):
                sharded(run, torch.ones(1, width)).sum().backward()
        release(layers.values())
        for layer in layers.values():
            layer.latent.grad = None
    return held, counted.peak


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("olmoe", {"train": ("latents", "scales")}),
    "fewer windows than ranks": ("llama", {"batch": 1, "held_out": 1}),
    "greedy": ("llama", {"mode": "greedy", "steps": 3}),
    "recomputed": ("qwen2", {"checkpoint_layers": True, "train": ("latents", "norms")}),
    "norms only": ("gpt2", {"train": ("norms",)}),
}


def train(ranks: Ranks, name: str) -> dict[str, Any]:
    """Histories of one process and of all ranks, and whether the same codes came out."""
    family, settings = RUNS[name]
    source = tiny_model(family)
    names = select_layers(source, None)
    prepare_for_layers_(source, names)
    text = torch.randint(128, (10, 16), generator=torch.Generator().manual_seed(1))
    student = copy.deepcopy(source)
    replace_modules(student, names, hard_code)
    base = {"steps": 5, "ctx": 16, "batch": 4, "micro_batch": 1, "lr": 3e-2, "evaluate_every": 2}
    base |= {"estimator": "soft", "start": 0.0}
    run = DistillConfig(**(base | settings))
    results = []
    for who in (ONE, ranks):
        torch.manual_seed(0)
        result = distill(
            copy.deepcopy(student),
            run,
            teacher=copy.deepcopy(source),
            text=(text[:8], text[8 : 8 + min(2, run.held_out)]),
            ranks=who,
        )
        logits = result.model(tokens(), use_cache=False).logits
        assert not any("FSDP" in type(module).__name__ for module in result.model.modules())
        results.append((result.history, logits))
    (one, expected), (several, found) = results
    return {
        "one": one,
        "several": several,
        "logits": float((found - expected).abs().max() / expected.abs().max()),
    }


JOBS: dict[str, Callable[[Ranks], dict[str, Any]]] = {
    "gradients": gradients,
    "bfloat16": lambda ranks: gradients(ranks, torch.bfloat16, 0.03),
    "memory": memory,
}


def main() -> None:
    folder, jobs = Path(sys.argv[1]), sys.argv[2:]
    torch.manual_seed(0)
    with join("cpu") as ranks:
        for job in jobs:
            torch.manual_seed(0)
            found = JOBS[job](ranks) if job in JOBS else train(ranks, job)
            every = ranks.gather(found)
            if ranks.first:
                (folder / f"{job}-{ranks.size}.json").write_text(json.dumps(every))


if __name__ == "__main__":
    main()
