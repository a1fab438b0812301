"""Post-training quantization of small models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from softtrellis.codes.scalar import lloyd_max
from softtrellis.io.sources import Source, load_source
from softtrellis.io.text import load_documents, token_windows
from softtrellis.modules.blocks import Blocks
from softtrellis.modules.replace import get_linear, linear_names, quantized_layers
from softtrellis.quantizers.ldlq import proxy_loss
from softtrellis.quantizers.scalar import round_to_nearest
from softtrellis.recipes.calibration import InputMoments, watch_inputs
from softtrellis.recipes.group import quantize_linear
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def watch(
    model: PreTrainedModel, index: int, windows: torch.Tensor
) -> tuple[InputMoments, torch.Tensor]:
    blocks = Blocks(model, windows, device=torch.device("cpu"), batch=2)
    states = blocks.states
    for i in range(index):
        states = blocks.run_all(i, states)
    names = [name for name in linear_names(model) if name.startswith(f"model.layers.{index}.")]
    linears = {name: get_linear(model, name) for name in names}
    return watch_inputs(blocks, index, states, linears, linears)


def test_hessians_are_the_second_moments(tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(0))
    name = "model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    handle = tiny_llama.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().reshape(-1, 112))
    )
    for window in windows:
        tiny_llama(window[None])
    handle.remove()
    x = torch.cat(seen)
    moments, _ = watch(tiny_llama, 1, windows)
    torch.testing.assert_close(moments.hessian(name), x.T @ x / x.shape[0])
    assert moments.tokens(name) == 48
    assert moments.hessian("model.layers.1.another") is None


def test_layers_with_the_same_inputs_share_their_moments(tiny_llama: LlamaForCausalLM) -> None:
    moments, _ = watch(tiny_llama, 0, torch.randint(128, (2, 16)))
    names = [name for name in linear_names(tiny_llama) if ".0." in name]
    short = [[name.rpartition(".")[2] for name in group] for group in moments.groups(names)]
    assert short == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_only_wanted_layers_are_counted(tiny_llama: LlamaForCausalLM) -> None:
    windows = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(0))
    blocks = Blocks(tiny_llama, windows, device=torch.device("cpu"), batch=2)
    linears = {n: m for n, m in blocks.layers[0].named_modules() if isinstance(m, torch.nn.Linear)}
    k, q = "self_attn.k_proj", "self_attn.q_proj"
    some, _ = watch_inputs(blocks, 0, blocks.states, linears, [k])
    every, _ = watch_inputs(blocks, 0, blocks.states, linears, linears)
    assert some.leaders == every.leaders
    assert list(some.moments) == [q] == [some.leaders[k]]
    torch.testing.assert_close(some.hessian(k), every.hessian(q))
    assert (some.tokens(k), some.tokens("mlp.up_proj")) == (32, 0)


@pytest.mark.parametrize(
    ("profile", "code", "L"), [("qtip", "gaussian", 8), ("qtip", "hyb", 10), ("qtip", "mul1", 8)]
)
def test_only_the_chosen_layers_change(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    text: str,
    profile: str,
    code: str,
    L: int,
) -> None:
    before = {name: p.clone() for name, p in tiny_llama.named_parameters()}
    config = QuantizeConfig(
        profile=profile,  # type: ignore[arg-type]
        code=code,
        L=L,
        layers=("1",),
        data=(text,),
        ctx=64,
        windows=4,
    )
    reports = {}
    model = quantize_model(tiny_llama, config, tokenizer=tiny_tokenizer, reports=reports)
    layers = quantized_layers(model)
    assert list(layers) == list(reports)
    assert all(name.startswith("model.layers.1.") for name in layers)
    assert len(layers) == 7
    for name, layer in layers.items():
        weight = before[name + ".weight"]
        assert 0 < float((layer.weight() - weight).square().mean() / weight.square().mean()) < 0.4
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_layers_narrower_than_a_tile_are_left_out_unless_named(
    tiny_llama: LlamaForCausalLM,
) -> None:
    layer = tiny_llama.model.layers[1]
    layer.mlp.gate = torch.nn.Linear(64, 1)
    name = "model.layers.1.mlp.gate"
    assert name not in QuantizeConfig(code="gaussian", L=8).names_of(tiny_llama)
    assert QuantizeConfig(code="gaussian", L=8, layers=(name,)).names_of(tiny_llama) == [name]


def test_exl3_profile(tiny_llama: LlamaForCausalLM) -> None:
    config = QuantizeConfig(profile="exl3", layers=("1.self_attn.v_proj",), error_feedback=False)
    layer = next(iter(quantized_layers(quantize_model(tiny_llama, config)).values()))
    assert layer.layer.padded == (128, 128)
    assert layer.out_scale is not None
    assert layer.layer.code.name == "mul1"


def test_the_same_seed_gives_the_same_bytes(tiny_llama: LlamaForCausalLM) -> None:
    linear = tiny_llama.model.layers[0].mlp.up_proj
    config = QuantizeConfig(code="gaussian", L=8)
    layer, values = config.layer_format(linear), config.trellis_code.codebook()
    a, b = (quantize_linear(linear.weight, None, layer, values, seed=s)[0] for s in (1, 1))
    other = quantize_linear(linear.weight, None, layer, values, seed=2)[0]
    assert torch.equal(a.codes, b.codes)
    assert not torch.equal(a.codes, other.codes)


def test_ldlq_beats_plain_rounding_on_a_real_layer(stories260k: Path, shared_data: Path) -> None:
    source: Source = load_source(str(stories260k))
    text = load_documents([str(shared_data / "tinystories.txt")], split="calibration")
    windows = token_windows(source.tokenizer, text, 256, limit=8)
    name = "model.layers.2.mlp.down_proj"
    hessian = watch(source.model, 2, windows)[0].hessian(name)
    weight = source.model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    config = QuantizeConfig(L=10)
    linear = source.model.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    layer, values = config.layer_format(linear), config.trellis_code.codebook()
    ldlq = quantize_linear(weight, hessian, layer, values)[1].proxy_loss
    plain = quantize_linear(weight, None, layer, values)[0].weight()
    sigma = weight.square().mean().sqrt()
    rounded = round_to_nearest(weight / sigma, lloyd_max(2)) * sigma
    assert ldlq < proxy_loss(weight, plain, hessian) < proxy_loss(weight, rounded, hessian)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "gptq"}, "unknown profile"),
        ({"bits": 5}, "k must be"),
        ({"L": 17}, "L must be"),
        ({"code": "zip"}, "unknown code"),
        ({"damping": 0.0}, "damping"),
        ({"profile": "exl3", "L": 12}, "L=16"),
        ({"profile": "exl3", "code": "hyb"}, "exl3"),
        ({"windows": 0}, "windows"),
    ],
)
def test_configs_that_make_no_sense(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeConfig(**change)  # type: ignore[arg-type]


def test_broken_weights_are_named(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    config = QuantizeConfig(code="gaussian", L=8, data=(text,), ctx=64, windows=2)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        quantize_model(tiny_llama, config, tokenizer=tiny_tokenizer)
