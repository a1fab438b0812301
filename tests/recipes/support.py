"""What the tests of training share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.qat import DistillConfig, distill
from softtrellis.recipes.stages import DistillResult

EVERYTHING = ("latents", "scales", "norms", "table")


class Setting:
    """A tiny teacher, its student in a 2-bit code, and a way to train it."""

    def __init__(self, teacher: Any, tokenizer: Any, text: str) -> None:
        self.teacher, self.tokenizer, self.text = teacher, tokenizer, text

    def student(self, code: str = "gaussian", L: int = 6) -> Any:
        """Rough, so that there is much to mend."""
        rough = {"inputs": "quantized", "code": code, "L": L, "ctx": 64, "windows": 16}
        config = QuantizeConfig(data=(self.text,), **rough)  # type: ignore[arg-type]
        return quantize_model(copy.deepcopy(self.teacher), config, tokenizer=self.tokenizer)

    def train(self, student: Any, directory: Path | None = None, **change: Any) -> DistillResult:
        settings = {"steps": 6, "batch": 4, "ctx": 64, "measure_every": 0, "lr": 3e-2}
        settings |= {"estimator": "soft", "start": 0.0} | change
        resume = settings.pop("resume", False)
        return distill(
            copy.deepcopy(student),
            DistillConfig(data=(self.text,), **settings),
            teacher=self.teacher,
            tokenizer=self.tokenizer,
            run_directory=directory,
            resume=resume,
        )


def losses(result: DistillResult) -> list[float]:
    return [record["loss"] for record in result.history]


def same(a: Any, b: Any) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
