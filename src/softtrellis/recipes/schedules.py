"""Learning rate and temperature over a run."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Literal, get_args

TemperatureSchedule = Literal["exponential", "cosine"]

FINAL_LR_SHARE = 0.1


def check_schedule(schedule: str) -> None:
    """ValueError if the temperature schedule is unknown."""
    if schedule not in get_args(TemperatureSchedule):
        raise ValueError(f"unknown schedule {schedule!r}; use 'exponential' or 'cosine'")


class Pace:
    """How far a run is, from 0 at its first step to 1 at its last, by steps or by the clock.

    By the clock the second step stands at 0, too, and the others at their share of the time that is
    left then: the first one compiles, for up to a third of a run of two minutes, and schedules that
    went on meanwhile would never be near their start.
    """

    def __init__(
        self,
        steps: int | None,
        seconds: float | None,
        *,
        step: int = 0,
        elapsed: float = 0.0,
        first: float | None = None,
    ) -> None:
        """Of a run of so many steps or seconds, whichever ends first, of which some are done.

        Args:
            steps, seconds: of the whole run; None is no limit.
            step, elapsed: steps done, and the seconds they took.
            first: seconds that the first of them took; None where none is done.
        """
        self._steps, self._seconds, self._first = steps, seconds, first
        self._done, self._before, self._began = step, elapsed, time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken so far."""
        return self._before + time.monotonic() - self._began

    def share(self, step: int) -> float:
        """Where ``step`` stands, which is about to be taken; 1 for the last one.

        By the clock a step is the last one if another one of the mean length, the first one apart,
        would end too late.
        """
        shares = [0.0]
        if self._steps is not None:
            shares.append(step / (self._steps - 1) if self._steps > 1 else 1.0)
        if self._seconds is not None:
            elapsed = self.elapsed
            if self._first is None and step > 0:
                self._first = elapsed
            begun = elapsed if self._first is None else self._first
            timed = step - max(self._done, 1)
            length = (elapsed - max(self._before, begun)) / timed if timed > 0 else 0.0
            end = self._seconds - 1.5 * length
            shares.append((elapsed - begun) / (end - begun) if end > begun else 1.0)
        return min(1.0, max(shares))


def reckoned_steps(ends: Sequence[float], seconds: float, *, uneven: int = 1) -> int:
    """How many steps fit into a run of so many seconds, from when its first steps ended.

    Args:
        ends: of all steps so far, in seconds since the start, one at least.
        seconds: of the whole run.
        uneven: first steps that do not count for the length of others where there are more: they
            compile and fill caches.
    """
    done = len(ends)
    first = min(uneven, done - 1)
    length = (ends[-1] - ends[first - 1]) / (done - first) if first else ends[0]
    left = seconds - ends[-1]
    return done + int(left / length) if left > length > 0 else done


def temperature_at(
    share: float, *, t_init: float, t_min: float, schedule: TemperatureSchedule
) -> float:
    """Temperature at a share of the run, 0 to 1: from ``t_init`` to ``t_min``, both reached.

    "exponential" falls by the same factor every step (BCJR-QAT, section 4), "cosine" along half a
    cosine.
    """
    if schedule == "exponential":
        factor: float = (t_min / t_init) ** share
        return t_init * factor
    return t_min + (t_init - t_min) * 0.5 * (1.0 + math.cos(math.pi * share))


def cosine_to_zero(step: int, steps: int, *, lr: float) -> float:
    """Half a cosine from ``lr`` at step 0 to zero after ``steps`` steps."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def learning_rate_at(
    share: float, step: int, *, lr: float, warmup: int, end: float = FINAL_LR_SHARE
) -> float:
    """Half a cosine from ``lr`` down to ``end`` of it, times a linear warm-up of so many steps."""
    cosine = end + (1 - end) * 0.5 * (1.0 + math.cos(math.pi * share))
    return lr * cosine * min(1.0, (step + 1) / (warmup + 1))
