"""Fused experts as plain linear layers: the same function, and only the routed tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import MOE, tiny_model, tokens
from torch import Tensor, nn

from softtrellis.modules.experts import (
    UnfusedExperts,
    expert_groups,
    expert_layout,
    unfuse_experts_,
)
from softtrellis.modules.replace import linear_names


def fused_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if expert_layout(m) is not None}


def unfused_modules(model: nn.Module) -> dict[str, UnfusedExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, UnfusedExperts)}


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_logits_are_the_fused_model_s(family: str, implementation: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    names = list(fused_modules(model))
    assert len(names) == (1 if family in ("deepseek_v3", "nemotron_h") else 2)
    expected = model(tokens(), use_cache=False).logits
    unfuse_experts_(model, linear_names(model))
    assert list(unfused_modules(model)) == names
    found = model(tokens(), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_outputs_and_gradients_of_the_module(family: str, dtype: torch.dtype) -> None:
    fused = next(iter(fused_modules(tiny_model(family)).values())).to(dtype)
    layout = expert_layout(fused)
    assert layout is not None
    unfused = UnfusedExperts(fused, layout)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 32, generator=generator).to(dtype).requires_grad_()
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=generator)
    results = []
    for module in (fused, unfused):
        y = module(x, index, weights)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    assert results[1][0].dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(*results, strict=True):
        scale = float(one.detach().abs().max())
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance * scale)
    assert unfused(x[:0], index[:0], weights[:0]).shape == (0, 32)


def test_hooks_see_the_routed_tokens_only() -> None:
    model = tiny_model("olmoe")
    unfuse_experts_(model, linear_names(model))
    name, experts = next(iter(unfused_modules(model).items()))
    routing: list[tuple[Tensor, Tensor]] = []
    experts.register_forward_pre_hook(lambda _, args: routing.append((args[0], args[1])))
    seen: dict[str, Tensor] = {}
    for each in experts.layout.linear_names():
        linear = model.get_submodule(f"{name}.{each}")
        linear.register_forward_pre_hook(lambda _, args, each=each: seen.update({each: args[0]}))
    model(tokens(4), use_cache=False)
    (states, index), *_ = routing
    for e in range(4):
        rows = (index == e).nonzero()[:, 0]
        if len(rows) == 0:
            assert f"{e}.gate_up_proj" not in seen
            continue
        assert torch.equal(seen[f"{e}.gate_up_proj"], states[rows])
        assert seen[f"{e}.down_proj"].shape == (len(rows), 48)


def test_an_expert_that_no_token_is_routed_to_is_not_called() -> None:
    fused = next(iter(fused_modules(tiny_model("olmoe")).values()))
    layout = expert_layout(fused)
    assert layout is not None
    unfused = UnfusedExperts(fused, layout)
    called: list[int] = []
    for e in range(4):
        linear = unfused.get_submodule(f"{e}.down_proj")
        linear.register_forward_hook(lambda *_, e=e: called.append(e))
    unfused(torch.randn(5, 32), torch.tensor([[1, 3]] * 5), torch.rand(5, 2))
    assert called == [1, 3]


def test_only_modules_with_a_named_layer_are_exchanged() -> None:
    model = tiny_model("qwen3_moe")
    unfuse_experts_(model, ["model.layers.1.mlp.experts.2.down_proj", "model.layers.0.mlp.gate"])
    assert list(unfused_modules(model)) == ["model.layers.1.mlp.experts"]
    assert list(fused_modules(model)) == ["model.layers.0.mlp.experts"]
    names = linear_names(model)
    assert "model.layers.0.mlp.experts.3.gate_up_proj" in names
    assert "model.layers.1.mlp.experts.3.gate_up_proj" in names


def test_the_copies_are_independent_and_complete() -> None:
    model = tiny_model("gpt_oss")
    before = copy.deepcopy(model)
    unfuse_experts_(model, linear_names(model))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(parameter.numel() for parameter in before.parameters())
    experts = next(iter(unfused_modules(model).values()))
    fused = next(iter(fused_modules(before).values()))
    linear = experts.get_submodule("3.gate_up_proj")
    assert torch.equal(linear.get_parameter("weight"), fused.get_parameter("gate_up_proj")[3].T)
    assert torch.equal(linear.get_parameter("bias"), fused.get_parameter("gate_up_proj_bias")[3])
    storages = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    assert len(storages) == len(list(experts.parameters())) == 16


def test_groups_of_experts() -> None:
    model = tiny_model("olmoe")
    names = [name for name in linear_names(model) if "layers.1" in name]
    assert expert_groups(model, names) == {}
    unfuse_experts_(model, names)
    prefix = "model.layers.1.mlp.experts"
    assert expert_groups(model, names) == {
        f"{prefix}.{each}": [f"{prefix}.{e}.{each}" for e in range(4)]
        for each in ("gate_up_proj", "down_proj")
    }
    one = [f"{prefix}.2.down_proj"]
    assert expert_groups(model, one) == {f"{prefix}.down_proj": one}


class Stack(nn.Module):
    """What a module of fused experts has, with shapes that can be spoiled."""

    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self, first: tuple[int, ...], down: tuple[int, ...]) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(first))
        self.down_proj = nn.Parameter(torch.zeros(down))


def test_layouts_that_do_not_fit() -> None:
    assert expert_layout(Stack((4, 12, 8), (4, 8, 6))) is not None
    assert expert_layout(Stack((4, 12, 8), (5, 8, 6))) is None
    assert expert_layout(Stack((4, 12, 8), (4, 6, 8))) is None
    assert expert_layout(Stack((4, 6, 8), (4, 8, 6))) is None
    assert expert_layout(Stack((48, 8), (4, 8, 6))) is None
    extra = Stack((4, 12, 8), (4, 8, 6))
    extra.scale = nn.Parameter(torch.zeros(4))
    assert expert_layout(extra) is None
    assert expert_layout(nn.Linear(2, 2)) is None
