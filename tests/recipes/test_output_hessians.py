"""Hessians of layers' outputs, and quantizing with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from recipes.support import same
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from softtrellis.cli.main import build_parser
from softtrellis.cli.quantize import configs
from softtrellis.evaluation.perplexity import score_many
from softtrellis.io.sources import load_source
from softtrellis.io.text import token_windows
from softtrellis.modules.quantized_linear import LayerFormat
from softtrellis.modules.replace import get_linear, linear_names, quantized_layers
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.recipes import estimate as estimate_module
from softtrellis.recipes.estimate import estimate
from softtrellis.recipes.group import quantize_group
from softtrellis.recipes.output_hessians import output_hessians
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.ranks import Ranks
from softtrellis.spec import TrellisSpec

CPU = torch.device("cpu")


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))


def expected_losses(model: LlamaForCausalLM, windows: torch.Tensor) -> list[torch.Tensor]:
    """The loss of every position, of the same draws."""
    generator, losses = torch.Generator().manual_seed(0), []
    for ids in windows:
        logits = model(ids[None]).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        losses.append(functional.cross_entropy(logits, drawn, reduction="sum"))
    return losses


def test_the_moments_are_those_of_the_gradients(
    tiny_llama: LlamaForCausalLM, windows: torch.Tensor
) -> None:
    name = "model.layers.1.mlp.up_proj"
    before = copy.deepcopy(tiny_llama.state_dict())
    found = output_hessians(tiny_llama, linear_names(tiny_llama), windows, device=CPU)
    assert found.keys() == set(linear_names(tiny_llama))
    outputs: list[torch.Tensor] = []
    hook = get_linear(tiny_llama, name).register_forward_hook(lambda *a: outputs.append(a[2]))
    gradients = []
    tiny_llama.requires_grad_(True)
    for i, loss in enumerate(expected_losses(tiny_llama, windows)):
        gradients.append(torch.autograd.grad(loss, outputs[i])[0][0])
    hook.remove()
    d = torch.cat(gradients)
    torch.testing.assert_close(found[name], d.T @ d / len(d), rtol=1e-4, atol=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in tiny_llama.state_dict().items())
    assert all(p.grad is None for p in tiny_llama.parameters())


def test_batches_change_rounding_only(tiny_llama: LlamaForCausalLM, windows: torch.Tensor) -> None:
    names = linear_names(tiny_llama)
    one, two = (output_hessians(tiny_llama, names, windows, device=CPU, batch=b) for b in (1, 2))
    for name in names:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-8)


@pytest.fixture
def quantize(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):  # type: ignore[no-untyped-def]
    letters = torch.randint(26, (2000,), generator=torch.Generator().manual_seed(0))
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + int(i)) for i in letters), encoding="utf-8")

    def run(directory: Path | None = None, *, resume: bool = False, **change: object):  # type: ignore[no-untyped-def]
        settings = {"code": "gaussian", "L": 6, "ctx": 32, "windows": 32, "data": (str(text),)}
        config = QuantizeConfig(**(settings | change))  # type: ignore[arg-type]
        model = copy.deepcopy(tiny_llama)
        return quantize_model(
            model, config, tokenizer=tiny_tokenizer, run_directory=directory, resume=resume
        )

    return run


def test_codes_take_the_worth_of_outputs_into_account() -> None:
    """Two layers of one group, in codes of their own: each has a smaller loss in both Hessians."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    def moment(n: int) -> torch.Tensor:
        a = torch.randn(n, n, generator=generator)
        return a @ torch.diag(torch.logspace(-3, 1, n)) @ a.T / n

    linears = {"wide": nn.Linear(64, 96), "narrow": nn.Linear(64, 32)}
    code = TrellisCode(TrellisSpec(6, 2, 1), "gaussian")
    formats = {n: LayerFormat(64, len(linear.weight), code) for n, linear in linears.items()}
    h, gs = moment(64), {n: moment(len(linear.weight)) for n, linear in linears.items()}
    losses: dict[str, list[float]] = {"wide": [], "narrow": []}
    for outputs in (None, gs):
        group = quantize_group(
            linears, h, formats, {code: code.codebook()}, leader="wide", outputs=outputs
        )
        for name, (layer, _) in group.items():
            error = layer.weight() - linears[name].weight.detach()
            losses[name].append(float((gs[name] @ error @ h * error).sum()))
    for one_sided, two_sided in losses.values():
        assert two_sided < 0.75 * one_sided


def test_the_same_again_and_other_codes_than_without(quantize) -> None:  # type: ignore[no-untyped-def]
    plain, one, two = quantize(), quantize(output_windows=8), quantize(output_windows=8)
    assert same(one, two)
    first = {name: layer.codes for name, layer in quantized_layers(plain).items()}
    for name, layer in quantized_layers(one).items():
        assert not torch.equal(layer.codes, first[name])


def test_with_a_quantized_output_layer_and_resumed(quantize, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run = tmp_path / "run"
    run.mkdir()
    model = quantize(run, output_windows=4, head_bits=4)
    assert same(model, quantize(run, resume=True, output_windows=4, head_bits=4))


class Two(Ranks):
    """Two ranks that have nothing to say to each other."""

    size = 2  # type: ignore[assignment]


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="output_windows must be 0 or more"):
        QuantizeConfig(output_windows=-1)
    with pytest.raises(ValueError, match="output_damping must be a positive number"):
        QuantizeConfig(output_damping=0.0)
    config = QuantizeConfig(output_windows=4, error_feedback=False)
    with pytest.raises(ValueError, match="needs Hessians: error_feedback"):
        quantize_model("teacher", config)
    with pytest.raises(ValueError, match="output_windows needs one rank"):
        quantize_model("teacher", QuantizeConfig(output_windows=4), ranks=Two())


def test_options_of_the_command() -> None:
    words = ["quantize", "m", "-o", "d", "--output-windows", "8", "--output-damping", "0.3"]
    config, *_ = configs(build_parser().parse_args(words))
    assert (config.output_windows, config.output_damping) == (8, 0.3)


def test_a_real_model_stays_nearer_to_itself(stories260k: Path, shared_data: Path) -> None:
    source = load_source(str(stories260k))
    stories = (shared_data / "tinystories.txt").read_text(encoding="utf-8")
    held_out = token_windows(source.tokenizer, [stories[-20000:]], 128)
    found = []
    for output_windows in (0, 128):
        config = QuantizeConfig(
            code="gaussian",
            L=8,
            layers=("1-3",),
            ctx=128,
            windows=128,
            data=(str(shared_data / "tinystories.txt"),),
            output_windows=output_windows,
        )
        model = quantize_model(copy.deepcopy(source.model), config, tokenizer=source.tokenizer)
        models = {"teacher": source.model, "model": model}
        found.append(score_many(models, held_out, "teacher", batch_size=16)["model"].kl_mean or 9.9)
    assert found[1] < 0.9 * found[0]


def test_it_is_in_the_estimate(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "_multiply_adds_per_second", lambda _: 1e9)
    monkeypatch.setattr(estimate_module, "_seconds_per_tile", lambda _, count, *rest: 1 / count)
    plain, more = (
        estimate(tiny_llama, QuantizeConfig(code="gaussian", L=6, output_windows=n), None)
        for n in (0, 32)
    )
    assert more.run_seconds > plain.run_seconds
    waves = (64 + 64) + (64 + 112) + (112 + 64)  # q k v o, which look alike; gate up; down
    assert more.encode_seconds == 2 * waves / 16
