"""Scalar QAT in the native basis with learned clipping: the baseline without rotation or trellis.

    python benchmarks/group_qat.py MODEL --calibration C4 --train documents:TRAIN --test TEXT \
        --json FILE NAME=OPTIONS ...

Every linear layer of the decoder is rounded to 2 bits in groups of 128 inputs, with a step and a
zero point per group in float16 (2.25 bits in all). Both are trained with the weights: gradients of
a rounded weight go straight through inside the clipping range and to the range outside (LSQ, arXiv
1902.08153; EfficientQAT, arXiv 2407.11062). Start: the smallest squared error of each group over a
few shrunk ranges. OPTIONS are of ``softtrellis train`` and give --lr (over each weight's root mean
square), --scale-lr (over each step's), --steps or --minutes, --batch, --micro-batch and --warmup.
Loss, text, schedules and scores are those of the other experiments.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import time

import torch
from experiment import Experiment, add_arguments
from torch import Tensor, nn
from torch.nn import functional

from softtrellis.cli.main import build_parser
from softtrellis.cli.train import config_of
from softtrellis.modules.replace import get_linear, linear_names, replace_modules
from softtrellis.recipes.network import Network, divergence
from softtrellis.recipes.optimizer import make_optimizer, set_learning_rates
from softtrellis.recipes.qat import DistillConfig
from softtrellis.recipes.schedules import Pace, learning_rate_at

BITS, GROUP = 2, 128
SHRUNK = torch.linspace(0.5, 1.0, 11)
MOST = 2**BITS - 1


def rounded(x: Tensor) -> Tensor:
    """To the nearest integer; the gradient of the identity."""
    return x + (x.round() - x).detach()


class GroupLinear(nn.Module):
    """A linear layer whose weight is rounded in groups of its inputs.

    Attributes:
        latent: float32 parameter [groups, GROUP].
        step, zero: float32 parameters [groups, 1]; values are (q - zero) * step.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        weight = linear.weight.detach()
        short = -weight.shape[1] % GROUP
        self.latent = nn.Parameter(functional.pad(weight, (0, short)).reshape(-1, GROUP))
        low, high = self.latent.detach().aminmax(dim=1, keepdim=True)
        found = []
        for share in SHRUNK.tolist():
            step = ((high - low) * share / MOST).clamp_min(1e-8)
            zero = -low * share / step
            error = (self._values(step, zero) - self.latent).detach().square().sum(1, keepdim=True)
            found.append((error, step, zero))
        best = torch.stack([error for error, _, _ in found]).argmin(0, keepdim=True)
        pick = (torch.stack([f[i] for f in found]).gather(0, best)[0] for i in (1, 2))
        self.step, self.zero = (nn.Parameter(value) for value in pick)

    def _values(self, step: Tensor, zero: Tensor) -> Tensor:
        return (rounded((self.latent / step + zero).clamp(0, MOST)) - zero) * step

    def weight(self) -> Tensor:
        """[out, in], rounded; differentiable."""
        values = self._values(self.step.half().float(), self.zero.half().float())
        rows = values.reshape(self.shape[0], -1)
        return rows[:, : self.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return functional.linear(x, self.weight().to(x.dtype), self.bias)

    def dense(self) -> nn.Linear:
        """The rounded layer."""
        outputs, inputs = self.shape
        linear = nn.Linear(inputs, outputs, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight().detach(), requires_grad=False)
        linear.bias = self.bias
        return linear


def run(experiment: Experiment, name: str, options: str, seed: int) -> None:
    """Trains all layers jointly, scores and records."""
    o = experiment.options
    line = f"train x --teacher x -o x --ctx {o.ctx} --device {o.device} --seed {seed} {options}"
    config = config_of(build_parser().parse_args(shlex.split(line)))
    with experiment.turn(alone=config.minutes is not None):
        began = time.perf_counter()
        student, log = trained(experiment, config)
        seconds = time.perf_counter() - began
    record = {"name": name, "seed": seed, "train": options, "seconds": seconds, "log": log}
    with experiment.turn():
        experiment.record(record, student)


def trained(
    experiment: Experiment, config: DistillConfig
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The model with trained weights, rounded, and the log."""
    o, seed = experiment.options, config.seed
    student = copy.deepcopy(experiment.teacher).to(o.device).requires_grad_(False)
    teacher = experiment.teacher.to(o.device)
    names = linear_names(student)
    layers = {name: GroupLinear(get_linear(student, name)).to(o.device) for name in names}
    replace_modules(student, names, lambda name, _: layers[name])
    if config.lr == "auto":
        raise ValueError("weights that are rounded in groups need --lr")
    parameters = [p for layer in layers.values() for p in (layer.latent, layer.step, layer.zero)]
    rates = []
    for layer in layers.values():
        for parameter in (layer.latent, layer.step, layer.zero):
            lr = config.lr if parameter is layer.latent else config.scale_lr
            rates.append(lr * float(parameter.detach().square().mean().sqrt()))
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    optimizer = make_optimizer("adamw", groups, fused=o.device == "cuda")
    windows = experiment.text[0]
    autocast = torch.bfloat16 if o.device == "cuda" else None
    nets = [Network(m, 0, windows[0], autocast=autocast) for m in (student, teacher)]
    pace = Pace(config.steps, None if config.minutes is None else 60 * config.minutes)
    log: list[dict[str, float]] = []
    share, size = 0.0, config.micro_batch or config.batch
    while share < 1:
        step = len(log)
        share = pace.share(step)
        set_learning_rates(
            optimizer,
            [
                learning_rate_at(share, step, lr=r, warmup=config.warmup, end=config.lr_end)
                for r in rates
            ],
        )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = windows[torch.randint(len(windows), (config.batch,), generator=generator)]
        total = 0.0
        for part in rows.split(size):
            with torch.no_grad():
                target = nets[1].features(part.to(o.device))
            found = nets[0].features(part.to(o.device))
            loss = divergence(nets[0], found, nets[1], target)
            (loss * (len(part) / len(rows))).backward()
            total += float(loss.detach()) * len(part) / len(rows)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"loss": total, "seconds": pace.elapsed})
    replace_modules(student, names, lambda name, _: layers[name].dense())
    return student, log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=OPTIONS")
    options = parser.parse_args()
    experiment = Experiment(options)
    for text in options.runs:
        name, _, train = text.partition("=")
        for seed in options.seeds:
            if experiment.claim(name, seed):
                run(experiment, name, train, seed)


if __name__ == "__main__":
    main()
