"""Tuning the scales and norms of a quantized model towards the original one (QTIP, section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softtrellis.io.progress import progress
from softtrellis.modules.replace import output_layer
from softtrellis.modules.scaled_linear import ScaledLinear, scale_, unscale_
from softtrellis.recipes.finetune import TuneReport, check_tuning, held_out_windows
from softtrellis.recipes.network import Network, divergence
from softtrellis.recipes.optimizer import BETAS
from softtrellis.recipes.ptq_state import LayerStore
from softtrellis.recipes.schedules import cosine_to_zero
from softtrellis.recipes.seeds import check_seed, epoch_generator


@dataclass(frozen=True)
class EndToEndConfig:
    """How a whole quantized model is tuned: Adam on the KL divergence from the original model.

    The scales of quantized layers, norms and biases are tuned, nothing with two dimensions; the
    best epoch by held-out windows is kept.

    Attributes:
        epochs: passes over the calibration windows.
        lr: learning rate of all.
        batch: windows per step.
        held_out: share of the windows that only choose the best epoch.
        seed: of the order of the windows.
    """

    epochs: int = 2
    lr: float = 1e-3
    batch: int = 2
    held_out: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        check_tuning(self.epochs, self.batch, self.held_out, lr=self.lr)
        check_seed(self.seed)


def tune_end_to_end(
    model: nn.Module,
    teacher: nn.Module,
    windows: Tensor,
    config: EndToEndConfig,
    store: LayerStore,
    *,
    show_progress: bool = False,
) -> TuneReport:
    """Tunes a quantized causal language model in place; codes stay as they are.

    Args:
        model: with ``QuantizedLinear`` layers, on the device that it is tuned on.
        teacher: the original model, likewise.
        windows: int64 [n, ctx], two at least.
        config: see ``EndToEndConfig``.
        store: where finished epochs are kept, and taken from.
        show_progress: show a progress bar.

    Returns:
        KL divergence in nats per token on the held-out windows.

    Raises:
        ValueError: fewer than two windows.
    """
    count = len(windows)
    held = held_out_windows(count, config.held_out)
    train, test = windows[: count - held], windows[count - held :]
    scale_(model)
    model.requires_grad_(False)
    tuned = _tuned_parameters(model)
    optimizer = torch.optim.Adam(tuned, lr=config.lr, betas=BETAS)
    autocast = torch.bfloat16 if tuned[0].is_cuda else None
    networks = [Network(m, 0, windows[0], autocast=autocast) for m in (model, teacher)]
    steps = config.epochs * math.ceil(len(train) / config.batch)
    done, before, best, kept = store.load_tuning(tuned, optimizer)
    if kept is None:
        before = best = _divergence(networks, test)
        kept = [p.detach().clone() for p in tuned]
    for parameter in tuned:
        parameter.requires_grad_(True)
    for epoch in progress(range(done, config.epochs), "tune", enabled=show_progress):
        generator = epoch_generator(config.seed, epoch)
        batches = torch.randperm(len(train), generator=generator).split(config.batch)
        for i, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = cosine_to_zero(epoch * len(batches) + i, steps, lr=config.lr)
            loss = _loss(networks, train[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = _divergence(networks, test)
        if found < best:
            best, kept = found, [p.detach().clone() for p in tuned]
        store.save_tuning(epoch + 1, before, best, tuned, kept, optimizer)
    with torch.no_grad():
        for parameter, value in zip(tuned, kept, strict=True):
            parameter.copy_(value)
            parameter.requires_grad_(False)
            parameter.grad = None
    unscale_(model)
    return TuneReport(before, best)


def _tuned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scales, biases of quantized layers, and every other parameter with one dimension.

    The output layer is left out: the loss takes it as frozen.
    """
    head = output_layer(model)
    scaled = [m for m in model.modules() if isinstance(m, ScaledLinear) and m is not head]
    own = [p for m in scaled for p in m.parameters()]
    ids = {id(p) for p in own}
    ids |= {id(p) for p in (head.parameters() if head is not None else ())}
    rest = [p for p in model.parameters() if p.ndim == 1 and p.is_floating_point()]
    return [*own, *(p for p in rest if id(p) not in ids)]


def _loss(networks: Sequence[Network], windows: Tensor) -> Tensor:
    student, teacher = networks
    with torch.no_grad():
        target = teacher.features(teacher.prefix(windows))
    return divergence(student, student.features(student.prefix(windows)), teacher, target)


@torch.no_grad()
def _divergence(networks: Sequence[Network], windows: Tensor) -> float:
    return sum(float(_loss(networks, window[None])) for window in windows) / len(windows)
