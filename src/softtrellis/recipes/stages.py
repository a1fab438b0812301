"""The stages of a run of training, its log and its saved state."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from softtrellis.evaluation.tensorboard import TensorBoardLog
from softtrellis.io.interrupts import StopRequest
from softtrellis.io.progress import progress
from softtrellis.recipes.drift import rate_of_walk
from softtrellis.recipes.plan import run_warning
from softtrellis.recipes.ranks import ONE, Ranks
from softtrellis.recipes.replay import WARM_UP
from softtrellis.recipes.run_state import RunLog, SavedState, load_state, save_state
from softtrellis.recipes.schedules import Pace, reckoned_steps
from softtrellis.recipes.trainables import LATENTS
from softtrellis.recipes.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from softtrellis.recipes.qat import DistillConfig

_log = logging.getLogger(__name__)

TIMED_STEPS = 3
"""Steps by which a run that the clock ends reckons how many it will take, at least."""


@dataclass(frozen=True, eq=False)
class DistillResult:
    """What training gave.

    Attributes:
        model: with the trained layers hardened to ``QuantizedLinear``.
        history: one record per step, as in ``log.jsonl``.
        changed_codes: share of trellis steps whose codeword differs from the start's, by layer.
        kept: for every stage the step whose code was kept, ``trainer.START`` (-1) for the code it
            started from, and its divergence on the held-out windows in nats per token; None where
            the last one's was kept unseen.
    """

    model: PreTrainedModel
    history: list[dict[str, Any]]
    changed_codes: dict[str, float]
    kept: list[tuple[int, float] | None]


class Run:
    """The stages of a run, its log and its saved state."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        text: tuple[Tensor, Tensor],
        config: DistillConfig,
        settings: dict[str, Any],
        directory: Path | None,
        *,
        resume: bool,
        ranks: Ranks = ONE,
    ) -> None:
        self.ranks = ranks
        self.student, self.teacher, self.config = student, teacher, config
        self.settings, self.directory = settings, directory
        self.windows, self.held_out = text
        self.finished = dict[str, Tensor]()
        self.resumed = SavedState()
        if resume and directory is not None:
            self.resumed = load_state(directory, settings=settings)
        self.done = self.resumed.step
        self.log = RunLog(directory if ranks.first else None, resume_at=self.done)
        self.log.records = ranks.agree(self.log.records)
        self.board: TensorBoardLog | None = None
        if config.tensorboard and directory is not None and ranks.first:
            self.board = TensorBoardLog(directory, resume_at=self.done)
        self.saved = time.monotonic()

    def train(self, stages: Sequence[Sequence[str]]) -> DistillResult:
        """All stages, one after the other."""
        changed: dict[str, float] = {}
        kept: list[tuple[int, float] | None] = []
        steps = self.config.steps
        total = 0 if steps is None else steps * len(stages)
        with progress(total, "train", enabled=self.config.show_progress) as bar:
            bar.update(self.done)
            for index, names in enumerate(stages):
                found, best = self._stage(index, names, len(stages), bar)
                changed |= found
                kept.append(None if best is None else (best[1], best[0]))
        if self.board is not None:
            self.board.close()
        return DistillResult(self.student, self.log.records, changed, kept)

    def _stage(
        self, index: int, names: Sequence[str], stages: int, bar: Any
    ) -> tuple[dict[str, float], tuple[float, int] | None]:
        """One stage; the changed codes by layer, and the best divergence with its step."""
        config = self.config
        text = self.windows, self.held_out
        trainer = Trainer(self.student, self.teacher, names, *text, config, self.ranks)
        prefix = f"{index}/"
        warned = False
        if index == 0 and not self.done and config.steps is not None:
            warned = self._warn(trainer, config.steps)
        saved = self.resumed.part(prefix, trainer.layers, self.ranks)
        if saved:
            try:
                trainer.restore(saved)
            except KeyError as error:
                raise ValueError(
                    f"the saved state lacks {error}; start over with --force"
                ) from error
        before = [record["seconds"] for record in self.log.records if record["stage"] < index]
        own = [record for record in self.log.records if record["stage"] == index]
        start = before[-1] if before else 0.0
        step, spent = len(own), own[-1]["seconds"] - start if own else 0.0
        seconds = None if config.minutes is None else 60 * config.minutes / stages
        ends = [record["seconds"] - start for record in own]
        first = ends[0] if ends else None
        pace = Pace(config.steps, seconds, step=step, elapsed=spent, first=first)
        uneven = 1 + (WARM_UP + 1 if config.cuda_graphs else 0)
        reckoning = uneven + max(TIMED_STEPS, config.viterbi_every)
        if own and seconds is not None and step >= reckoning:
            self._reckon(trainer, ends[:reckoning], seconds, uneven)
        finished = bool(own) and own[-1]["share"] >= 1
        with StopRequest() as stop:
            while not finished:
                share = self.ranks.agree(pace.share(step))
                record = {"step": len(self.log.records), "stage": index, "share": share}
                if step == 0:
                    record |= trainer.evaluate_start()
                record |= trainer.step(step, share)
                record["seconds"] = start + pace.elapsed
                self._append(record, bar)
                step, finished = step + 1, share >= 1
                ends.append(record["seconds"] - start)
                timed = step == reckoning or (finished and step < reckoning)
                if timed and seconds is not None:
                    steps = self._reckon(trainer, ends, seconds, uneven)
                    if index == 0 and not warned and steps != config.steps:
                        fit = f"about {steps} steps fit into {seconds / 60:.3g} minutes, and with"
                        self._warn(trainer, steps, f"{fit} so many ")
                stop.number = self._agreed_stop(stop.number)
                if self._save_is_due() or (stop.number is not None and self.directory is not None):
                    self._save(index, trainer)
                stop.check()
        if stages > 1:  # the next stages' saved states hold this one's
            state = trainer.state()
            self.finished |= {prefix + k: t.detach().cpu().clone() for k, t in state.items()}
        return trainer.harden(), trainer.best

    def _warn(self, trainer: Trainer, steps: int, when: str = "") -> bool:
        """Says, on one rank, if so many steps change no codes, or too many; whether it did."""
        if not self.ranks.first or LATENTS not in self.config.train:
            return False
        warning = run_warning(
            trainer.layers,
            estimator=self.config.estimator,
            lr=trainer.rates.lr,
            steps=steps,
            warmup=self.config.warmup,
            temperature=trainer.t_init,
            backend=self.config.backend,
        )
        if warning is not None:
            _log.warning(when + warning)
        return warning is not None

    def _reckon(self, trainer: Trainer, ends: Sequence[float], seconds: float, uneven: int) -> int:
        """How many steps a stage of so many seconds will take; sets the learning rate "auto".

        See ``reckoned_steps``; with ``viterbi_every`` the timed steps hold a search, at least.
        The radii that a warning then measures are from where the first steps have led, which lowers
        them by no more than these steps' travel.
        """
        steps = self.ranks.agree(reckoned_steps(ends, seconds, uneven=uneven))
        if self.config.steps is not None:
            steps = min(steps, self.config.steps)
        if self.config.lr == "auto":
            config = self.config
            trainer.rates.lr = rate_of_walk(
                steps, warmup=config.warmup, viterbi_every=config.viterbi_every
            )
        return steps

    def _append(self, record: dict[str, Any], bar: Any) -> None:
        self.log.append(record)
        if self.board is not None:
            self.board.append(record)
        shown = {"loss": f"{record['loss']:.4f}"}
        if {self.config.estimator, self.config.finish} - {"identity", None}:
            shown["T"] = f"{record['temperature']:.3f}"
        for key, name in (("soft_hard_gap", "gap"), ("changed_codes", "changed")):
            if key in record:
                shown[name] = f"{record[key]:.3f}"
        if "heldout_kl_hard" in record:
            shown["held-out"] = f"{record['heldout_kl_hard']:.4f}"
        bar.set_postfix(**shown)
        bar.update()

    def _save_is_due(self) -> bool:
        if self.directory is None:
            return False
        every, minutes = self.config.save_every, self.config.save_minutes
        by_steps = every > 0 and len(self.log.records) % every == 0
        due = by_steps or 0 < 60 * minutes <= time.monotonic() - self.saved
        return self.ranks.agree(due)

    def _agreed_stop(self, number: int | None) -> int | None:
        """The signal that some rank got, after the same step on all."""
        return max(self.ranks.gather(number or 0)) or None

    def _save(self, index: int, trainer: Trainer) -> None:
        assert self.directory is not None
        tensors = self.finished | {f"{index}/{key}": t for key, t in trainer.state().items()}
        step, settings = len(self.log.records), self.settings
        save_state(self.directory, tensors, step=step, settings=settings, ranks=self.ranks)
        self.saved = time.monotonic()
