"""Training of a few decoder layers, looked at more closely than ``softtrellis train`` does.

Held-out divergence of the code that a run ends with, whatever is kept; drift and changed codes of
all tiles, by linear layer; and hard codes on windows of the test text along the trajectory, which
are reported and choose nothing.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from experiment import Experiment
from torch import Tensor, nn

from softtrellis.evaluation.perplexity import WindowScores, score_many
from softtrellis.modules.latent_linear import release
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import (
    on_device,
    prepare_for_layers_,
    quantized_layers,
    share_codebooks_,
)
from softtrellis.recipes.drift import combine, evenly_spaced, measure_all
from softtrellis.recipes.qat import DistillConfig
from softtrellis.recipes.stages import DistillResult
from softtrellis.recipes.trainer import START, Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayerTrainer(Trainer):
    """Measures all tiles, and scores every hard code that is judged.

    Attributes:
        test: int64 [n, ctx], windows of the test text; n may be 0.
        tested: scores on them by step, ``START`` for the code that training starts from.
    """

    test: Tensor
    tested: dict[int, dict[str, list[float]]]
    teacher: nn.Module

    def _drift(self) -> dict[str, Any]:
        """Of all tiles; ``by_layer`` has the figures of every linear layer, and its tiles."""
        counts = {name: layer.layer.tiles for name, layer in self.layers.items()}
        found = measure_all(self.layers, max(counts.values()))
        by_layer = {name: {"tiles": counts[name]} | asdict(drift) for name, drift in found.items()}
        total = combine([(counts[name], drift) for name, drift in found.items()])
        return asdict(total) | {"by_layer": by_layer}

    def _judge(self, hardened: dict[str, QuantizedLinear], step: int) -> float:
        """As for any run; then the same code's scores on the test text, in float32."""
        judged = super()._judge(hardened, step)
        if len(self.test):
            for name, layer in self.layers.items():
                layer.hold_hard(hardened[name])
            models = {"teacher": self.teacher, "model": self.student}
            scores = score_many(models, self.test, "teacher", batch_size=4, chunk=2048)["model"]
            release(self.layers.values())
            self.tested[step] = window_scores(scores)
        return judged


class LayerExperiment(Experiment):
    """Runs of a few decoder layers."""

    def __init__(self, options: argparse.Namespace, trajectory_windows: int = 0) -> None:
        """``trajectory_windows`` of the test text, evenly spaced, are scored along trajectories."""
        super().__init__(options)
        self.trajectory = self.test[evenly_spaced(len(self.test), trajectory_windows)]

    def train(self, model: PreTrainedModel, config: DistillConfig) -> DistillResult:
        """All quantized layers, jointly, for ``config.steps`` steps; the log has what is added."""
        assert config.steps is not None
        names = list(quantized_layers(model))
        prepare_for_layers_(self.teacher, names)
        history: list[dict[str, Any]] = []
        with on_device(model, config.device), on_device(self.teacher, config.device):
            trainer = LayerTrainer(model, self.teacher, names, *self.text, config)
            trainer.test, trainer.tested, trainer.teacher = self.trajectory, {}, self.teacher
            began = time.monotonic()
            for step in range(config.steps):
                record: dict[str, Any] = {"step": step}
                if step == 0:
                    record |= trainer.evaluate_start()
                    if START in trainer.tested:
                        record["test_start"] = trainer.tested[START]
                share = step / (config.steps - 1) if config.steps > 1 else 1.0
                record |= trainer.step(step, share)
                if step in trainer.tested:
                    record["test"] = trainer.tested[step]
                record["seconds"] = time.monotonic() - began
                history.append(record)
            changed = trainer.harden()
        share_codebooks_(model)
        kept = None if trainer.best is None else (trainer.best[1], trainer.best[0])
        return DistillResult(model, history, changed, [kept])

    def record(self, record: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """Adds ``heldout``, the hard model's scores on the windows that choose settings."""
        if len(self.text[1]):
            record["heldout"] = window_scores(self.score(model, self.text[1]))
        return super().record(record, model)


def window_scores(scores: WindowScores) -> dict[str, list[float]]:
    """Sums over the tokens of each window, and how many there are."""
    assert scores.kl is not None
    rounded = partial(torch.round, decimals=4)
    return {
        "nll": rounded(scores.nll).tolist(),
        "kl": rounded(scores.kl).tolist(),
        "tokens": scores.tokens.tolist(),
    }
