"""Time and memory of a joint training step on several GPUs, for a model's shapes.

    torchrun --nproc-per-node 1 benchmarks/bench_ranks.py llama-3.2-1b
    torchrun --nproc-per-node 2 benchmarks/bench_ranks.py llama-3.2-1b

Weights are random. The global batch is the same whatever the number of ranks. Prints the median
seconds of each part of a step on the slowest rank, and the peak of the memory of every rank. The
parts are measured one after the other, with a barrier before each, and "whole step" is what counts.

On several ranks "network" has in it, for every micro-batch, what decoder layers do as they run:
two gathers, three rotations and a reduce-scatter. "gathers alone" are one round of them without
anything that they overlap with. On one rank the rotations are in "hold" and "release".
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_step import SHAPES, models, step_config, step_parser

from softtrellis.modules.latent_linear import hold, release
from softtrellis.modules.latent_stacks import batches, codewords_of
from softtrellis.recipes.ranks import Ranks, join, shard_frozen_
from softtrellis.recipes.trainer import Trainer


class Clock:
    """Seconds of named parts, each on the slowest rank."""

    def __init__(self, ranks: Ranks, device: str) -> None:
        self._ranks, self._cuda = ranks, device == "cuda"
        self.seconds: dict[str, list[float]] = {}

    def time(self, part: str, work: Callable[[], object]) -> None:
        self._ranks.agree(None)
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        slowest = max(self._ranks.gather(time.perf_counter() - began))
        self.seconds.setdefault(part, []).append(slowest)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


@torch.no_grad()
def codewords(trainer: Trainer) -> None:
    """BCJR forward on this rank's tiles, without a graph."""
    for batch in batches(trainer.layers.values()):
        codewords_of(batch)


def gathers(trainer: Trainer) -> None:
    """Every decoder layer's codewords to all ranks, one after the other."""
    sharded = [] if trainer._sharded is None else trainer._sharded.units()
    for unit in sharded:
        unit.unshard()
        unit.reshard()


def network(trainer: Trainer, step: int, size: int) -> None:
    """Teacher, student and its backward pass on this rank's windows, between hold and release."""
    rows = trainer._text.rows(step)
    with torch.enable_grad():
        for part in trainer._objective.parts(rows, size):
            loss = trainer._objective.loss(part) * (len(part) / len(rows))
            loss.backward()


def measure(trainer: Trainer, clock: Clock, step: int, size: int) -> None:
    layers = list(trainer.layers.values())
    clock.time("whole step", lambda: trainer.step(step, 0.5))
    clock.time("codewords (BCJR forward)", lambda: codewords(trainer))
    clock.time("gathers alone", lambda: gathers(trainer))
    clock.time("hold (codewords for the passes)", lambda: hold(layers))
    clock.time("network", lambda: network(trainer, step + 1, size))
    clock.time("release (BCJR backward)", lambda: release(layers))
    clock.time("common gradients and norm", trainer._reduce_gradients)
    clock.time("optimizer", trainer.optimizer.step)
    trainer.optimizer.zero_grad()


def main() -> None:
    parser = step_parser(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="timed ones")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    options = parser.parse_args()
    with join(options.device) as ranks:
        run(options, ranks)


def run(options: argparse.Namespace, ranks: Ranks) -> None:
    torch.manual_seed(0)  # the same models on every rank
    teacher, student, names = models(options.shape, options.L, options.device)
    shard_frozen_(teacher, ranks)
    generator = torch.Generator().manual_seed(0)
    count, vocabulary = 4 * options.batch, SHAPES[options.shape]["vocab_size"]
    windows = torch.randint(vocabulary, (count * options.steps, options.ctx), generator=generator)
    config = step_config(options, reencode_every=0)
    trainer = Trainer(student, teacher, names, windows, windows[:0], config, ranks)
    for step in range(options.warm_up):
        trainer.step(step, 0.5)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(ranks, options.device)
    for step in range(options.steps):
        measure(trainer, clock, options.warm_up + 2 * step, options.micro_batch)
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else 0.0
    peaks = ranks.gather(peak)
    if not ranks.first:
        return
    weights = sum(layer.layer.tiles * 256 for layer in trainer.layers.values())
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{options.shape}, {ranks.size} x {name}, torch {torch.__version__}")
    print(f"{weights:,} weights; {options.batch} x {options.ctx} tokens; {options.estimator}")
    for part, seconds in clock.seconds.items():
        print(f"{part:40} {statistics.median(seconds):8.3f} s")
    print("peak of each rank, GiB: " + ", ".join(f"{peak:.1f}" for peak in peaks))


if __name__ == "__main__":
    main()
