"""Seeds that random generators take, and those that they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from softtrellis.recipes.benchmark import BenchmarkConfig
from softtrellis.recipes.end_to_end import EndToEndConfig
from softtrellis.recipes.finetune import FineTuneConfig
from softtrellis.recipes.generation import GenerateConfig
from softtrellis.recipes.plan import PlanConfig
from softtrellis.recipes.progressive import ProgressiveConfig
from softtrellis.recipes.ptq import QuantizeConfig
from softtrellis.recipes.qat import DistillConfig
from softtrellis.recipes.seeds import epoch_generator

CONFIGS = (
    BenchmarkConfig,
    DistillConfig,
    EndToEndConfig,
    FineTuneConfig,
    GenerateConfig,
    PlanConfig,
    ProgressiveConfig,
    QuantizeConfig,
)


@pytest.mark.parametrize("config", CONFIGS)
def test_seeds_that_no_generator_takes(config: Callable[..., Any]) -> None:
    for seed in (-1, 2**63, 99999999999999999999999):
        with pytest.raises(ValueError, match=rf"^seed must be from 0 to 2\*\*63 - 1, got {seed}$"):
            config(seed=seed)
    assert config(seed=2**63 - 1).seed == 2**63 - 1


def test_every_epoch_has_numbers_of_its_own() -> None:
    for seed in (0, 3, 2**63 - 1):
        drawn = {float(torch.rand((), generator=epoch_generator(seed, e))) for e in range(8)}
        assert len(drawn) == 8
