"""What a run may train."""

from __future__ import annotations

import copy
import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.support import EVERYTHING, Setting, losses

from softtrellis.io.checkpoint import base_of, load_quantized, save_quantized
from softtrellis.io.sources import Source
from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import decoder_layers, get_linear, quantized_layers
from softtrellis.recipes import objective, trainer
from softtrellis.recipes.optimizer import (
    gradient_norm,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    scale_gradients_,
)
from softtrellis.recipes.qat import DistillConfig
from softtrellis.recipes.training_text import (
    DEFAULT_CTX,
    TrainingWindows,
    WindowOrder,
    window_length,
)


def test_passes_in_parts_and_recomputed_ones_change_nothing(setting: Setting) -> None:
    student = setting.student()
    whole = losses(setting.train(student))
    assert whole[-1] < whole[0]
    for change in ({"micro_batch": 3}, {"checkpoint_layers": True}):
        assert losses(setting.train(student, **change)) == pytest.approx(whole, rel=1e-3)


def test_compiled_layers_change_nothing(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    options: dict[str, Any] = {"train": ("latents", "scales", "norms"), "held_out": 0}
    plain = setting.train(setting.student(), **options)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = setting.train(setting.student(), compile=True, **options)
    assert losses(found) == pytest.approx(losses(plain), rel=1e-4)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 3, (
        "the teacher's layers share one; of the student's the first takes no gradient"
    )
    assert not counters["graph_break"]
    for model in (found.model, setting.teacher):
        _, layers = decoder_layers(model)
        assert all("forward" not in vars(layer) for layer in layers), "left as they were"


def test_all_that_can_be_trained_is_saved_with_the_model(setting: Setting, tmp_path: Path) -> None:
    student = setting.student("hyb", 10)
    result = setting.train(
        student, train=EVERYTHING, steps=8, scale_lr=1e-2, table_lr=1e-2, held_out=0
    )
    before, after = student.state_dict(), result.model.state_dict()
    norms = [name for name in before if name.endswith("norm.weight")]
    assert len(norms) == 5
    assert not any(torch.equal(before[name], after[name]) for name in norms)
    layers = quantized_layers(result.model)
    first, *others = layers.values()
    assert not torch.equal(first.codebook, next(iter(quantized_layers(student).values())).codebook)
    assert all(layer.codebook is first.codebook for layer in others)
    for layer in layers.values():
        assert layer.in_scale is not None
        assert layer.out_scale is not None
        assert not torch.equal(layer.in_scale, torch.ones_like(layer.in_scale))
        assert not torch.equal(layer.out_scale, torch.ones_like(layer.out_scale))
    assert losses(result)[-1] < losses(result)[0]

    folder = tmp_path / "saved"
    folder.mkdir()
    base = base_of(Source("tiny", setting.teacher, setting.tokenizer, None, "mit"))
    save_quantized(result.model, setting.tokenizer, folder, base=base)
    ids = torch.randint(128, (2, 16))
    with torch.no_grad():
        assert torch.equal(load_quantized(folder)(ids).logits, result.model(ids).logits)


@pytest.mark.parametrize("parts", [("scales",), ("norms",), ("table",)])
def test_codes_stay_where_latents_are_not_trained(setting: Setting, parts: tuple[str, ...]) -> None:
    student = setting.student("hyb", 10)
    change = {"scale_lr": 1e-2, "table_lr": 1e-2, "held_out": 0, "start": 0.5}
    result = setting.train(student, train=parts, **change)
    assert losses(result)[-1] < losses(result)[0]
    if parts != ("table",):  # other codewords can have other nearest paths
        assert set(result.changed_codes.values()) == {0.0}


def test_a_table_is_trained_with_all_that_share_it(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, other = setting.student("hyb", 10), setting.student()
    monkeypatch.setattr(setting, "text", "no-such.txt")  # which is not looked for
    for change in ({"layers": ("1",)}, {"mode": "greedy"}):
        with pytest.raises(ValueError, match="share it"):
            setting.train(student, train=("table",), **change)
    with pytest.raises(ValueError, match="no table"):
        setting.train(other, train=("table",))


def test_latents_can_start_at_the_original_weights(setting: Setting) -> None:
    student = setting.student()
    starts: dict[float, LatentLinear] = {}
    original = trainer.Trainer.harden

    def spy(self: Any) -> dict[str, float]:
        starts[self.config.start] = next(iter(self.layers.values()))
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "harden", spy)
        for start in (0.0, 0.5, 1.0):
            setting.train(student, start=start, steps=1, lr=1e-12)
    name = next(iter(quantized_layers(student)))
    weight = get_linear(setting.teacher, name).weight
    whole = starts[1.0]
    torch.testing.assert_close(whole.basis.to_weight(whole.latent), weight, atol=1e-5, rtol=1e-4)
    between = (starts[0.0].latent + whole.latent) / 2
    torch.testing.assert_close(starts[0.5].latent, between)


def test_another_estimator_finishes_the_run(setting: Setting) -> None:
    seen: list[str] = []
    original = trainer.hold

    def spy(layers: Any) -> None:
        seen.append(next(iter(layers)).estimator)
        original(layers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "hold", spy)
        setting.train(
            setting.student(), steps=5, finish="identity", finish_share=0.3, evaluate_every=0
        )
    assert seen == ["soft", "soft", "soft", "identity", "identity"]


@pytest.mark.parametrize(("batch", "steps"), [(3, 20), (12, 5)])
def test_every_epoch_has_one_permutation_from_the_seed(
    monkeypatch: pytest.MonkeyPatch, batch: int, steps: int
) -> None:
    """With batches over the end of an epoch, and over several of them."""
    expected: list[int] = []
    for epoch in range(12):
        generator = torch.Generator().manual_seed(7 * 1_000_003 + epoch)
        expected += torch.randperm(5, generator=generator).tolist()
    drawn, permutation = [0], torch.randperm

    def counted(size: int, **options: Any) -> torch.Tensor:
        drawn[0] += 1
        return permutation(size, **options)

    monkeypatch.setattr(torch, "randperm", counted)
    order = WindowOrder(5, batch, seed=7)
    assert [row for step in range(steps) for row in order.rows(step)] == expected
    assert drawn[0] == 12
    middle = WindowOrder(5, batch, seed=7).rows(3)  # where a resumed run starts
    assert middle == expected[3 * batch : 4 * batch]


def test_windows_of_later_epochs_begin_elsewhere() -> None:
    text = torch.arange(5 * 7)
    windows = TrainingWindows(text.view(5, 7), 5, seed=7, shift=True)
    shifts = []
    for epoch in range(6):
        rows = windows.rows(epoch)  # a step is an epoch
        assert sorted(rows) == list(range(5 * epoch, 5 * epoch + 5))
        whole = windows.tokens(sorted(rows)).flatten()
        shifts.append(int(whole[0]))
        assert torch.equal(whole, text.roll(-shifts[-1]))
        assert torch.equal(windows.tokens(rows[2:4]), windows.tokens(rows)[2:4])
    assert shifts == [0, 4, 1, 5, 3, 0]
    fixed = TrainingWindows(text.view(5, 7), 5, seed=7, shift=False)
    assert [row % 5 for row in windows.rows(4)] == fixed.rows(4)
    assert torch.equal(fixed.tokens([3, 0]), text.view(5, 7)[[3, 0]])


def test_windows_are_shifted_where_no_layer_runs_again_for_it(setting: Setting) -> None:
    student, change = setting.student(), {"steps": 9, "windows": 8, "batch": 4, "held_out": 0}
    given, shifted, fixed = (
        losses(setting.train(student, shift_windows=shift, **change))
        for shift in (None, True, False)
    )
    assert given == shifted
    assert given[:2] == fixed[:2]
    assert given[2] != fixed[2]
    change["layers"] = ("1",)
    given, shifted, fixed = (
        losses(setting.train(student, shift_windows=shift, **change))
        for shift in (None, True, False)
    )
    assert given == fixed != shifted


def test_steps_without_a_finite_gradient_are_left_out(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, original = setting.student(), objective.divergence
    bad = {2}

    def spoiled(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(0)
        loss = original(*args, **options)
        return loss * math.nan if len(calls) - 1 in bad else loss

    monkeypatch.setattr(objective, "divergence", spoiled)
    calls: list[int] = []
    result = setting.train(student, held_out=0)
    assert [record.get("skipped") for record in result.history] == [None, None, 1, None, None, None]
    assert math.isfinite(losses(result)[-1])
    bad, calls = set(range(100)), []
    result = setting.train(setting.student(), steps=5, held_out=0, reencode_every=0)
    assert [record["skipped"] for record in result.history] == [1, 2, 3, 4, 5]
    assert set(result.changed_codes.values()) == {0.0}, "a step that is left out changes nothing"
    with pytest.raises(
        ValueError, match=r"no finite gradient for 10 steps.*lower lr or raise t_min"
    ):
        setting.train(setting.student(), steps=20, held_out=0)
    assert len(calls) == 15


def test_layers_that_are_not_trained_come_back_as_they_were(setting: Setting) -> None:
    student = setting.student()
    result = setting.train(student, layers=("1.mlp.up_proj",), lr=0.3, steps=8)
    for name, layer in quantized_layers(student).items():
        other = result.model.get_submodule(name)
        assert isinstance(other, QuantizedLinear)
        assert torch.equal(layer.codes, other.codes) == (not name.endswith("1.mlp.up_proj"))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_state_of_an_optimizer_goes_on_where_it_was(name: Any) -> None:
    if name == "adamw8bit":
        pytest.importorskip("torchao", reason="needs torchao")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 128, generator=generator)

    def made() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(start.clone())
        return parameter, make_optimizer(name, [{"params": [parameter], "lr": 0.1}], fused=False)

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, number: int) -> None:
        parameter.grad = torch.full_like(parameter, 1.0 + number)
        optimizer.step()
        optimizer.zero_grad()

    one, two = made(), made()
    for number in range(3):
        step(*one, number)
    saved = {k: t.clone() for k, t in optimizer_tensors(one[1], {"p": one[0]}).items()}
    load_optimizer_tensors(two[1], {"p": two[0]}, saved)
    two[0].data.copy_(one[0].data)
    for number in range(3, 5):
        step(*one, number)
        step(*two, number)
    assert torch.equal(one[0], two[0])


def test_parameters_of_one_rate_are_one_group(setting: Setting) -> None:
    groups: list[dict[str, Any]] = []
    original = trainer.make_optimizer

    def spy(name: Any, given: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        groups.extend(given)
        return original(name, given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_optimizer", spy)
        student = setting.student()
        setting.train(student, train=("latents", "norms"), steps=1)
    rates = [group["lr"] for group in groups]
    assert len(set(rates)) == len(rates)
    assert max(len(group["params"]) for group in groups) >= len(quantized_layers(student))


def test_norm_and_scale_of_all_gradients() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 5)]
    assert float(gradient_norm(parameters)) == 0.0
    scale_gradients_(parameters, 0.5)
    parameters[0].grad = torch.full((3,), 2.0)
    parameters[2].grad = torch.full((5,), -2.0)
    norm = gradient_norm(parameters)
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(32**0.5, rel=1e-12)
    scale_gradients_(parameters, 0.5)
    assert parameters[1].grad is None
    assert parameters[2].grad.tolist() == [-1.0] * 5


def test_packages_that_are_asked_for(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    student = setting.student()
    if find_spec("tensorboard") is None:
        with pytest.raises(ImportError, match=r"\.\[tensorboard\]"):
            setting.train(student, tmp_path, tensorboard=True)
    if find_spec("torchao") is None:
        monkeypatch.setattr(setting, "text", "no-such.txt")  # which is not looked for
        with pytest.raises(ImportError, match=r"\.\[optim\]"):
            setting.train(student, optimizer="adamw8bit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "train must name one"),
        ({"train": ("weights",)}, "train must be some of"),
        ({"steps": None}, "give steps or minutes"),
        ({"minutes": 0.0}, "minutes must be a positive"),
        ({"start": 1.5}, "start must lie"),
        ({"finish": "hard"}, "unknown estimator"),
        ({"finish_share": -0.1}, "finish_share must lie"),
        ({"mix": 0.5}, "mix must be left out where no estimator is 'mixed', got 0.5"),
        ({"estimator": "mixed", "mix": 1.5}, "mix must lie"),
        ({"bcjr_stride": 4}, "bcjr_stride must be left out with 'identity' alone, got 4"),
        ({"estimator": "mixed", "bcjr_stride": 0}, "bcjr_stride must be at least 1"),
        ({"finish_share": 0.5}, "finish_share must be left out where no finish is named, got 0.5"),
        (
            {"finish": "soft", "finish_share": 0.0},
            "finish_share must be above 0 with finish 'soft'",
        ),
        ({"optimizer": "sgd"}, "unknown optimizer"),
        ({"clip": -1.0}, "clip must be a positive"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"held_out": -1}, "held_out must be 0"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_configs_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**change)


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["soft", "straight_through", "mixed", "identity"])
def test_a_gpu_does_what_the_cpu_does(setting: Setting, estimator: str) -> None:
    student = setting.student("hyb", 10)
    change = {"estimator": estimator, "train": ("latents", "scales", "norms"), "measure_every": 3}
    found = {device: setting.train(student, device=device, **change) for device in ("cpu", "cuda")}
    assert losses(found["cuda"]) == pytest.approx(losses(found["cpu"]), rel=0.05)
    assert {p.device.type for p in found["cuda"].model.parameters()} == {"cpu"}
    kept = [result.kept[0] for result in found.values()]
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[1][1] == pytest.approx(kept[0][1], rel=0.1)


def test_windows_are_no_longer_than_the_model_has_positions(setting: Setting) -> None:
    model = copy.copy(setting.teacher)
    model.config = copy.deepcopy(setting.teacher.config)
    for positions, length in ((128, 128), (8192, DEFAULT_CTX)):
        model.config.max_position_embeddings = positions
        assert window_length(None, model) == length
        assert window_length(positions, model) == positions
    with pytest.raises(ValueError, match="at most the model's 8192 positions, got 8193"):
        window_length(8193, model)
    few = setting.teacher.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"at most the model's {few} positions"):
        setting.train(setting.student(), ctx=few + 1)
