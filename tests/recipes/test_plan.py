"""What a planned run can do to codes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from softtrellis.codes.codebook import codebook
from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.quantized_linear import LayerFormat
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.recipes.drift import WALK, learning_rates
from softtrellis.recipes.escape import boundary
from softtrellis.recipes.group import quantize_linear
from softtrellis.recipes.plan import (
    Plan,
    PlanConfig,
    measure_radii,
    plan_layers,
    run_warning,
    sample_tiles,
)
from softtrellis.recipes.plan_text import (
    describe,
    noise_warning,
    plan_record,
    verdict_in_words,
    warning_for,
)
from softtrellis.spec import TrellisSpec

WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
ALL = torch.arange(8)
RAYS = ("random", "sign", "soft", "teacher")


@pytest.fixture
def layer() -> LatentLinear:
    """Eight tiles; the codebook's root mean square is not 1."""
    code = TrellisCode(TrellisSpec(8, 2, 1), "mul1", normalize=False)
    format_ = LayerFormat(64, 32, code, channel_scales=True)
    return LatentLinear.from_quantized(quantize_linear(WEIGHT, None, format_, code.codebook())[0])


def plan_of(layer: LatentLinear, **run: float) -> Plan:
    return plan_layers({"a.b": layer}, PlanConfig(**run), targets={"a.b": WEIGHT})  # type: ignore[arg-type]


def test_radii_are_in_sigma(layer: LatentLinear) -> None:
    radii = measure_radii(layer, ALL, PlanConfig(), target=WEIGHT)
    assert radii.keys() == {"nearest", "per_weight", *RAYS}
    bounds = boundary(layer.start, layer.codebook, layer.layer.code.spec)
    sigma = layer.variance**0.5
    assert sigma > 1.05
    torch.testing.assert_close(radii["nearest"] * sigma, bounds.rms)
    torch.testing.assert_close(radii["per_weight"] * sigma, bounds.per_weight)
    for kind in RAYS:
        assert bool((radii[kind] > radii["nearest"]).all())
    for kind in ("sign", "soft"):  # every weight moves equally far
        assert bool((radii[kind] >= radii["per_weight"] * 0.998).all())


def test_soft_gradients_point_at_near_paths(layer: LatentLinear) -> None:
    radii = measure_radii(layer, ALL, PlanConfig(temperature=0.05))
    assert float(radii["soft"].mean()) < 0.9 * float(radii["sign"].mean())


def test_codes_change_where_the_radii_say(layer: LatentLinear) -> None:
    sigma = layer.variance**0.5
    radii, start = measure_radii(layer, ALL, PlanConfig(), target=WEIGHT), layer.latent.clone()
    towards = layer.basis.to_latent(WEIGHT) - start
    rms = towards.reshape(2, 16, 4, 16).square().mean((1, 3), keepdim=True).sqrt()
    ray = (towards.reshape(2, 16, 4, 16) / rms).reshape(32, 64)
    for t in (0.1, 0.2, 0.25, 0.3, 0.4):
        layer.latent.data = start + t * sigma * ray
        changed = (layer.hard_states() != layer.start).any(1)
        assert torch.equal(changed, radii["teacher"] < t)


def test_bounds_of_latents_beside_their_codewords(layer: LatentLinear) -> None:
    """They stay bounds: every direction takes at least so much, from there too."""
    sigma, before = layer.variance**0.5, measure_radii(layer, ALL, PlanConfig())
    layer.latent.data += 0.01 * sigma * torch.randn(32, 64).sign()
    after = measure_radii(layer, ALL, PlanConfig())
    for kind in ("nearest", "per_weight"):
        expected = (before[kind] - 0.01).clamp_min(0)
        torch.testing.assert_close(after[kind], expected, atol=1e-5, rtol=0)
    layer.latent.data += 10.0 * torch.randn(32, 64)
    assert bool((measure_radii(layer, ALL, PlanConfig())["nearest"] >= 0).all())


@pytest.mark.parametrize(
    ("run", "warning", "verdict"),
    [
        ({"lr": 1e-5}, "this run cannot change a code", "This run cannot change a code"),
        ({"lr": 1e-2, "steps": 4}, "this run cannot change a code", "This run cannot"),
        ({"lr": 1e-2, "steps": 100}, None, "Codes"),
        ({"lr": 1e-1, "steps": 100}, None, "Codes will change: in 100% of the tiles"),
    ],
)
def test_warnings(
    layer: LatentLinear, run: dict[str, float], warning: str | None, verdict: str
) -> None:
    plan = plan_of(layer, **run)
    found = warning_for(plan)
    assert (found or "").startswith(warning or "")
    assert (found is None) == (warning is None)
    assert verdict_in_words(plan).startswith(verdict)
    assert verdict_in_words(plan) in describe(plan)


def test_a_run_between_the_bounds(layer: LatentLinear) -> None:
    """Some direction could change a code, but the soft gradient's does not."""
    radii = measure_radii(layer, ALL, PlanConfig())
    between = 0.5 * float(radii["per_weight"].min() / 1.165 + radii["soft"].min())
    per_lr = plan_of(layer, lr=1.0).prediction.budget.consistent
    warning = warning_for(plan_of(layer, lr=between / per_lr))
    assert warning is not None
    assert warning.startswith("this run will hardly change a code")
    factor = float(warning.split(" times the lr")[0].split()[-1])
    followed = plan_of(layer, lr=between / per_lr * factor * 1.05)
    assert warning_for(followed) is None
    assert followed.prediction.measured_verdict == "escapes only if gradients agree"


def test_the_bound_holds_for_adam(layer: LatentLinear) -> None:
    """The worst gradients there are change nothing in a run that is warned of."""
    plan = plan_of(layer, lr=1e-2, steps=4)
    assert str(warning_for(plan)).startswith("this run cannot")
    sigma = layer.variance**0.5
    optimizer = torch.optim.AdamW([layer.latent], lr=1e-2 * sigma, betas=(0.9, 0.95))
    for _ in range(4):
        optimizer.zero_grad()
        layer.latent.grad = layer.latent.detach() - layer.basis.to_latent(WEIGHT)
        optimizer.step()
    assert torch.equal(layer.hard_states(), layer.start)


def test_the_record_is_json(layer: LatentLinear) -> None:
    plan = plan_of(layer)
    plan.layers["a.b"]["sign"][0] = torch.inf
    record = json.loads(json.dumps(plan_record(plan), allow_nan=False))
    assert record["layers"]["a.b"]["sign"][0] is None
    assert record["layers"]["a.b"]["random"] == plan.radii["random"].tolist()
    assert record["prediction"]["budget"]["consistent"] == plan.prediction.budget.consistent
    assert record["settings"]["steps"] == 240


def test_samples_are_spread_over_the_layers() -> None:
    counts = {f"layer {i}": 100 for i in range(6)} | {"small": 2}
    config = PlanConfig(tiles=16)
    sample = sample_tiles(counts, config)
    assert [len(tiles) for tiles in sample.values()] == [3, 3, 2, 2, 2, 2, 2]
    assert all(int(tiles.max()) < counts[name] for name, tiles in sample.items())
    assert all(len(set(tiles.tolist())) == len(tiles) for tiles in sample.values())
    again = sample_tiles(counts, config)
    assert all(torch.equal(sample[name], again[name]) for name in sample)
    few = sample_tiles(counts, replace(config, tiles=2))
    assert list(few) == ["layer 0", "layer 3"]
    assert len(sample_tiles({"small": 2}, config)["small"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"tiles": 0}, "tiles must be at least 1"),
        ({"maximum": 0.0}, "maximum must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_plans_that_make_no_sense(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanConfig(**change)  # type: ignore[arg-type]


def test_codes_of_several_trellises(layer: LatentLinear) -> None:
    code = TrellisCode(TrellisSpec(10, 2, 2), "gaussian")
    table = codebook("gaussian", code.spec)
    wide = LatentLinear.from_quantized(
        quantize_linear(WEIGHT, None, LayerFormat(64, 32, code), table)[0]
    )
    plan = plan_layers({"narrow": layer, "wide": wide}, PlanConfig(tiles=6))
    assert [len(radii["sign"]) for radii in plan.layers.values()] == [3, 3]
    assert plan.prediction.radius == pytest.approx(0.01247, rel=1e-3)
    assert "teacher" not in plan.radii
    assert "towards the teacher" not in describe(plan)


def test_the_warning_at_the_start_of_a_run(layer: LatentLinear) -> None:
    def warned(estimator: str, lr: float, steps: int) -> str:
        found = run_warning(
            {"layer": layer},
            estimator=estimator,  # type: ignore[arg-type]
            lr=lr,
            steps=steps,
            warmup=0,
            temperature=0.1,
        )
        return found or ""

    for estimator in ("soft", "identity"):
        assert "cannot change a code" in warned(estimator, 1e-4, 10)
        assert warned(estimator, 1e-2, 100) == warned(estimator, 1e-2, 40) == ""
    assert warned("soft", 1e-1, 100) == ""
    assert "takes 100% of 8 sampled tiles out of their cells" in warned("identity", 1e-1, 100)


def test_the_warning_knows_what_the_start_changes(layer: LatentLinear) -> None:
    """A run with tiny steps leaves codes where latents start, which may be in other cells."""

    def warned() -> str:
        found = run_warning(
            {"layer": layer}, estimator="identity", lr=1e-5, steps=3, warmup=0, temperature=0.1
        )
        assert found is not None
        return found

    assert "beyond" not in warned()
    codewords = layer.latent.detach().clone()
    layer.latent.data[:16] += 0.3 * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    changed = (layer.hard_states() != layer.start).any(1)
    assert 0 < int(changed.sum()) < 8
    moved = f"{float(changed.double().mean()):.0%}"
    text = f"this run will hardly change a code beyond those that change at its start, in {moved}"
    assert warned().startswith(text)
    layer.latent.data = codewords
    assert "beyond" not in warned()


def test_noise_is_warned_of_up_to_a_rate_that_is_named(layer: LatentLinear) -> None:
    loud = plan_of(layer, lr=1e-1)
    warning = noise_warning(loud)
    assert warning is not None
    assert warning in verdict_in_words(loud)
    safe = float(warning.split("with lr ")[1].split()[0])
    quiet = plan_of(layer, lr=safe)
    assert noise_warning(quiet) is None
    assert quiet.prediction.budget.random == pytest.approx(WALK, rel=0.05)


def test_noise_changes_as_many_codes_as_is_warned_of(layer: LatentLinear) -> None:
    """AdamW on gradients of random sign: a share between half and all of what the ray gives."""
    plan = plan_of(layer, lr=3e-2)
    share = float((plan.radii["random"] < plan.prediction.budget.random).float().mean())
    assert noise_warning(plan) is not None
    sigma = layer.variance**0.5
    optimizer = torch.optim.AdamW([layer.latent], lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    for rate in learning_rates(3e-2, 100):
        optimizer.param_groups[0]["lr"] = rate * sigma
        layer.latent.grad = torch.randn_like(layer.latent).sign()
        optimizer.step()
    changed = float((layer.hard_states() != layer.start).any(1).float().mean())
    assert 0.5 * share <= changed <= 1.0
