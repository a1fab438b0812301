"""QTIP's fine-tuning: what a block still has in full precision makes up for what it lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softtrellis.modules.blocks import Blocks
from softtrellis.modules.scaled_linear import scale_, unscale_
from softtrellis.recipes.optimizer import BETAS, size_of
from softtrellis.recipes.schedules import cosine_to_zero
from softtrellis.recipes.seeds import check_seed


def check_tuning(epochs: int, batch: int, held_out: float, **rates: float) -> None:
    """ValueError for settings of tuning that make no sense."""
    for name, count in (("epochs", epochs), ("batch", batch)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    check_rates(**rates)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")


def check_rates(**rates: float) -> None:
    """ValueError for learning rates that make no sense."""
    for name, rate in rates.items():
        if not 0 < rate < math.inf:
            raise ValueError(f"{name} must be a positive number, got {rate}")


def held_out_windows(count: int, share: float) -> int:
    """How many of so many windows are held out: one at least, and not all.

    Raises:
        ValueError: fewer than two windows.
    """
    if count < 2:
        raise ValueError("fine-tuning needs two calibration windows at least; raise windows")
    return min(count - 1, max(1, round(share * count)))


@dataclass(frozen=True)
class FineTuneConfig:
    """How blocks are tuned while they are quantized (QTIP, section 4 and appendix).

    After every group of linear layers that share their inputs, the weights of the block that are
    not quantized yet, the input and output scales of those that are, biases and norms are tuned to
    the output of the original block: Adam, mean squared error, the best epoch by held-out windows.

    Attributes:
        epochs: passes over the calibration windows for each group.
        lr: learning rate of the weights, over the root mean square of each matrix.
        scale_lr: learning rate of scales, norms and biases, likewise.
        batch: windows per step.
        held_out: share of the windows that only choose the best epoch.
        seed: of the order of the windows.
    """

    epochs: int = 5
    lr: float = 1e-2
    scale_lr: float = 3e-3
    batch: int = 8
    held_out: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        check_tuning(self.epochs, self.batch, self.held_out, lr=self.lr, scale_lr=self.scale_lr)
        check_seed(self.seed)


@dataclass(frozen=True)
class TuneReport:
    """What tuning did to a block's output on held-out windows.

    Attributes:
        before, after: mean squared error over the mean square of what the block adds to its input.
    """

    before: float
    after: float


def tune_block(
    blocks: Blocks,
    index: int,
    states: Tensor,
    targets: Tensor,
    config: FineTuneConfig,
    linears: Sequence[nn.Linear],
) -> TuneReport:
    """Tunes a decoder layer that is on the device; its quantized layers keep their codes.

    Args:
        blocks: the model.
        index: of the decoder layer.
        states: [n, ctx, d], what enters it.
        targets: [n, ctx, d], what it should make of that.
        config: see ``FineTuneConfig``.
        linears: layers of it whose weights are tuned, those that are still to be quantized; of all
            else only what has one dimension is: scales, norms and biases.

    Raises:
        ValueError: fewer than two windows.
    """
    count = len(states)
    held = held_out_windows(count, config.held_out)
    train, test = slice(0, count - held), slice(count - held, count)
    layer = blocks.layers[index]
    energy = float((targets - states).float().square().mean())
    scale_(layer)
    vectors = [p for p in layer.parameters() if p.ndim < 2 and p.is_floating_point()]
    tuned = [*vectors, *(linear.weight for linear in linears)]
    rates = [relative_rate(p, config.lr, config.scale_lr) for p in tuned]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(tuned, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    for parameter in tuned:
        parameter.requires_grad_(True)
    size = min(config.batch, blocks.batch)
    batches = list(_batches(count - held, config))
    done, steps = 0, sum(len(epoch) for epoch in batches)

    def error() -> float:
        return _error(blocks, index, states[test], targets[test]) / energy

    before = best = error()
    kept = [p.detach().clone() for p in tuned]
    inputs, wanted = states[train], targets[train]
    for epoch in batches:
        for step in epoch:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = cosine_to_zero(done, steps, lr=rate)
            optimizer.zero_grad()
            for rows in step.split(size):
                with torch.enable_grad():
                    found = blocks.run(index, inputs[rows])
                    loss = (found.float() - wanted[rows].float()).square().sum()
                (loss / (step.numel() * wanted[0].numel() * energy)).backward()
            optimizer.step()
            done += 1
        found_error = error()
        if found_error < best:
            best = found_error
            kept = [p.detach().clone() for p in tuned]
    with torch.no_grad():
        for parameter, value in zip(tuned, kept, strict=True):
            parameter.copy_(value)
    for parameter in tuned:
        parameter.requires_grad_(False)
        parameter.grad = None
    unscale_(layer)
    return TuneReport(before, best)


def relative_rate(parameter: Tensor, lr: float, scale_lr: float) -> float:
    """A rate over the parameter's root mean square: ``lr`` of matrices, ``scale_lr`` of vectors."""
    return (lr if parameter.ndim > 1 else scale_lr) * size_of(parameter)


def _batches(count: int, config: FineTuneConfig) -> Iterator[tuple[Tensor, ...]]:
    """For every epoch the window numbers of its steps, in a new order."""
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        yield torch.randperm(count, generator=generator).split(config.batch)


@torch.no_grad()
def _error(blocks: Blocks, index: int, states: Tensor, targets: Tensor) -> float:
    total = 0.0
    for part, wanted in zip(states.split(blocks.batch), targets.split(blocks.batch), strict=True):
        total += float((blocks.run(index, part).float() - wanted.float()).double().square().sum())
    return total / targets.numel()
