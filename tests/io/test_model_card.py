"""What a checkpoint's model card says of its weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from softtrellis.io.model_card import model_card
from softtrellis.modules.quantized_linear import LayerFormat
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.recipes.qat import DistillConfig
from softtrellis.spec import TrellisSpec

LAYERS = {"layer": LayerFormat(32, 16, TrellisCode(TrellisSpec(8, 2, 1), "mul1"))}
QUANTIZED = {"quantize": {"seed": 0}}
SAME = "All other weights are those of the base model."
TRAINED = "Norms and biases were trained, too; all other weights are those of the base model."
UNKNOWN = "Whether other weights were changed, too, is not recorded."


def trained(*parts: str) -> dict[str, Any]:
    return {"train": asdict(DistillConfig(train=parts))}


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [
        (QUANTIZED, SAME),
        ({"quickstart": {"L": 10}}, SAME),
        (QUANTIZED | trained("latents", "scales", "table"), SAME),
        (QUANTIZED | {"train": asdict(DistillConfig())}, TRAINED),
        (QUANTIZED | {"train": {"train": ["latents", "norms"]}}, TRAINED),
        (QUANTIZED | {"train": {"steps": 4}}, TRAINED),
        *((QUANTIZED | {step: {}}, TRAINED) for step in ("fine_tune", "progressive", "end_to_end")),
        (QUANTIZED | {"fine_tune": {}} | trained("latents"), TRAINED),
        ({}, UNKNOWN),
        ({"import": {"quant_method": "exl3"}}, UNKNOWN),
    ],
)
def test_the_other_weights(provenance: dict[str, Any], expected: str) -> None:
    lines = model_card("tiny", "mit", LAYERS, provenance).splitlines()
    assert f"{expected} The licence of the base model (mit) applies." in lines
