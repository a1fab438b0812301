"""Learning rate and temperature over a run."""

from __future__ import annotations

import math
from typing import Literal, get_args

TemperatureSchedule = Literal["exponential", "cosine"]

FINAL_LR_SHARE = 0.1


def check_schedule(schedule: str) -> None:
    """ValueError if the temperature schedule is unknown."""
    if schedule not in get_args(TemperatureSchedule):
        raise ValueError(f"unknown schedule {schedule!r}; use 'exponential' or 'cosine'")


def temperature_at(
    step: int, steps: int, *, t_init: float, t_min: float, schedule: TemperatureSchedule
) -> float:
    """Temperature of step 0 to ``steps - 1``: from ``t_init`` to ``t_min``, both reached.

    "exponential" falls by the same factor every step (BCJR-QAT, section 4), "cosine" along half a
    cosine.
    """
    share = step / (steps - 1) if steps > 1 else 1.0
    if schedule == "exponential":
        factor: float = (t_min / t_init) ** share
        return t_init * factor
    return t_min + (t_init - t_min) * 0.5 * (1.0 + math.cos(math.pi * share))


def cosine_to_zero(step: int, steps: int, *, lr: float) -> float:
    """Half a cosine from ``lr`` at step 0 to zero after ``steps`` steps."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def learning_rate_at(step: int, steps: int, *, lr: float, warmup: int) -> float:
    """Linear warm-up over ``warmup`` steps, then half a cosine down to a tenth of ``lr``."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, steps - 1 - warmup)
    return lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1.0 + math.cos(math.pi * share)))
