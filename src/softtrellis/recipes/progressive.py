"""Quantizing progressively: what is not quantized yet learns to make up for what is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softtrellis.io.progress import progress
from softtrellis.modules.replace import (
    decoder_layers,
    on_device,
    weights_held,
)
from softtrellis.recipes.finetune import check_rates, relative_rate
from softtrellis.recipes.network import Network, divergence, layers_compiled
from softtrellis.recipes.optimizer import make_optimizer, set_learning_rates
from softtrellis.recipes.ptq_state import LayerStore
from softtrellis.recipes.schedules import learning_rate_at
from softtrellis.recipes.seeds import check_seed
from softtrellis.recipes.training_text import WindowOrder


@dataclass(frozen=True)
class ProgressiveConfig:
    """How decoder layers are trained behind those that are quantized already.

    After every decoder layer the weights behind it that will be quantized, norms and biases take
    some steps of AdamW towards the original model's predictions (forward KL over the full
    vocabulary); then the next one is quantized as it has become. That is incremental quantization
    (Zhou et al., 2017, arXiv 1702.03044, there by magnitude) with LDLQ for the quantizer and
    distillation for the loss.

    Attributes:
        steps: after each decoder layer.
        lr: learning rate of matrices, over the root mean square of each.
        scale_lr: learning rate of norms and biases, likewise.
        warmup: steps of linear warm-up after each decoder layer; then a cosine to a tenth.
        batch: windows per step.
        micro_batch: windows that pass the model at once; None is ``batch``.
        data: texts, see ``load_documents``, without what training on the same texts holds out to
            choose its step by (``train_and_held_out_documents``); None is the calibration windows.
        ctx: tokens per window of ``data``.
        compile: run decoder layers through ``torch.compile``, for faster steps on a GPU.
        seed: of the order of the windows.
    """

    steps: int = 16
    lr: float = 1e-2
    scale_lr: float = 3e-3
    warmup: int = 3
    batch: int = 16
    micro_batch: int | None = 4
    data: tuple[str, ...] | None = None
    ctx: int = 1024
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_rates(lr=self.lr, scale_lr=self.scale_lr)
        check_seed(self.seed)
        limits = ("steps", 1), ("batch", 1), ("micro_batch", 1), ("warmup", 0), ("ctx", 2)
        for name, least in limits:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


class Progressive:
    """Trains what lies behind a decoder layer, in place."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        names: Sequence[str],
        windows: Tensor,
        config: ProgressiveConfig,
        store: LayerStore,
        *,
        device: torch.device,
        show_progress: bool = False,
    ) -> None:
        """Trains ``model`` towards ``teacher`` on windows int64 [n, ctx]; all else is frozen.

        ``names`` are the layers that are quantized sooner or later. ``store`` keeps what was
        trained, and gives it back where a run is gone on with.
        """
        self._model, self._teacher, self._windows = model, teacher, windows
        self._names = set(names)
        model.requires_grad_(False)
        self._config, self._store, self._device = config, store, device
        self._order = WindowOrder(len(windows), config.batch, config.seed)
        self._show_progress = show_progress
        self._autocast = torch.bfloat16 if device.type == "cuda" else None

    def after(self, index: int) -> None:
        """Trains the layers behind decoder layer ``index``, the last that is quantized.

        Raises:
            ValueError: a loss that is not finite.
        """
        behind = self._behind(index)
        saved = self._store.rest_index()
        if saved >= index:
            if saved == index:
                self._store.load_rest(behind)
            return
        with (
            on_device(self._model, self._device),
            on_device(self._teacher, self._device),
            _trained(behind.values()),
            weights_held(self._model),
        ):
            self._train(index, list(behind.values()))
        self._store.save_rest(index, behind)

    def _behind(self, index: int) -> dict[str, nn.Parameter]:
        """Weights that will be quantized, and vectors, of the decoder layers behind."""
        prefix, layers = decoder_layers(self._model)
        return {
            f"{prefix}.{number}.{name}": parameter
            for number in range(index + 1, len(layers))
            for name, parameter in layers[number].named_parameters()
            if parameter.ndim == 1
            or f"{prefix}.{number}.{name}".removesuffix(".weight") in self._names
        }

    def _train(self, index: int, parameters: list[nn.Parameter]) -> None:
        config = self._config
        rates = [relative_rate(p, config.lr, config.scale_lr) for p in parameters]
        groups: list[dict[str, Any]] = [
            {"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)
        ]
        optimizer = make_optimizer("adamw", groups, fused=self._device.type == "cuda")
        first, window = index + 1, self._windows[0]
        student = Network(self._model, first, window, autocast=self._autocast)
        teacher = Network(self._teacher, 0, window, autocast=self._autocast)
        size = config.micro_batch or config.batch
        steps = progress(range(config.steps), f"behind layer {index}", enabled=self._show_progress)
        with (
            layers_compiled(self._model, config.compile, first),
            layers_compiled(self._teacher, config.compile),
        ):
            for step in steps:
                share = step / max(config.steps - 1, 1)
                wanted = (learning_rate_at(share, step, lr=r, warmup=config.warmup) for r in rates)
                set_learning_rates(optimizer, list(wanted))
                rows = self._order.rows(index * config.steps + step)
                loss = 0.0
                for part in torch.tensor(rows).split(size):
                    loss += self._backward(student, teacher, self._windows[part], len(rows))
                if not math.isfinite(loss):
                    raise ValueError(f"loss {loss} behind decoder layer {index}; lower the lr")
                optimizer.step()
                optimizer.zero_grad()

    def _backward(self, student: Network, teacher: Network, ids: Tensor, count: int) -> float:
        with torch.no_grad():
            target = teacher.features(teacher.prefix(ids))
            states = student.prefix(ids)
        with torch.enable_grad():
            loss = divergence(student, student.features(states), teacher, target)
            loss = loss * (len(ids) / count)
            loss.backward()
        return float(loss.detach())


@contextmanager
def _trained(parameters: Any) -> Iterator[None]:
    """Lets parameters collect gradients, for a while."""
    chosen = list(parameters)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)
            parameter.grad = None
