"""One stage of training: some layers through their trellis, all others frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softtrellis.evaluation.perplexity import split_head
from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.replace import (
    decoder_index,
    get_linear,
    get_quantized,
    linear_names,
    quantized_layers,
    replace_modules,
)
from softtrellis.modules.tail import Tail
from softtrellis.recipes.drift import combine, measure
from softtrellis.recipes.losses import forward_kl
from softtrellis.recipes.schedules import learning_rate_at, temperature_at
from softtrellis.trellis.bcjr import FLOAT32_TEMPERATURES

if TYPE_CHECKING:
    from softtrellis.recipes.qat import DistillConfig

BETAS = (0.9, 0.95)
_CACHE_BYTES = 2 << 30
_CHUNK = 256


class Network:
    """A causal language model as prefix, tail and head, see ``Tail``."""

    def __init__(self, model: nn.Module, first: int, window: Tensor) -> None:
        split = split_head(model, window)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.head, self.device = split.head, next(model.parameters()).device
        self._whole = split.features
        self.tail = Tail(model, first, window.to(self.device)) if split.head is head else None

    @property
    def first(self) -> int:
        """The decoder layer at which the tail starts; 0 where the model cannot be cut."""
        return self.tail.first if self.tail else 0

    def prefix(self, ids: Tensor) -> Tensor:
        """int64 [b, ctx] to what ``features`` takes, without gradients."""
        return self.tail.prefix(ids.to(self.device)) if self.tail else ids

    def features(self, states: Tensor) -> Tensor:
        """What the head takes, [b * (ctx - 1), d]: all positions but the last."""
        if self.tail is None:
            return self._whole(states)
        return self.tail.features(states)[:, :-1].flatten(0, 1)


class Trainer:
    """Trains the named layers of a student together."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        names: Sequence[str],
        windows: Tensor,
        config: DistillConfig,
    ) -> None:
        self.student, self.names, self.windows, self.config = student, names, windows, config
        first = min(decoder_index(student, name) for name in names)
        inside = set(linear_names(student)) & quantized_layers(student).keys()
        before = [name for name in inside if decoder_index(student, name) < first]
        self.teacher_network = Network(teacher, first, windows[0])
        self.student_network = Network(student, first, windows[0])
        same_cut = self.teacher_network.first == self.student_network.first
        self.shared_prefix = same_cut and not before
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._cached_bytes = 0

        for parameter in student.parameters():
            parameter.requires_grad_(False)
        self.t_init = self._initial_temperature(teacher)
        self.layers: dict[str, LatentLinear] = {}
        for name in names:
            self.layers[name] = LatentLinear.from_quantized(
                get_quantized(student, name),
                estimator=config.estimator,
                temperature=self.t_init,
                backend=config.backend,
            )
        self._check_temperatures()
        replace_modules(student, names, lambda name, _: self.layers[name])
        self.optimizer = torch.optim.AdamW(
            [{"params": [layer.latent]} for layer in self.layers.values()],
            lr=config.lr,
            betas=BETAS,
            weight_decay=0.0,
        )

    def _initial_temperature(self, teacher: nn.Module) -> float:
        """``t_init``, or twice the mean squared quantization error over the weights' variance."""
        if self.config.t_init != "auto":
            return float(self.config.t_init)
        error = energy = 0.0
        for name in self.names:
            weight = get_linear(teacher, name).weight.detach()
            found = get_quantized(self.student, name).weight()
            error += float((found - weight).double().square().sum())
            energy += float(weight.double().square().sum())
        return max(2.0 * error / energy, self.config.t_min)

    def _check_temperatures(self) -> None:
        low, high = FLOAT32_TEMPERATURES
        for layer in self.layers.values():
            variance = layer.codebook_variance
            if self.config.t_min * variance < low * (1 - 1e-6) or self.t_init * variance > high:
                raise ValueError(
                    f"temperatures of this code must lie between {low / variance:.3g} and "
                    f"{high / variance:.3g}, got t_init={self.t_init:.3g}, "
                    f"t_min={self.config.t_min:.3g}"
                )

    def _batch(self, step: int) -> list[int]:
        """Indices of the windows of a step: every epoch a new permutation, from the seed."""
        count, chosen = self.windows.shape[0], []
        for position in range(step * self.config.batch, (step + 1) * self.config.batch):
            epoch, place = divmod(position, count)
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            chosen.append(int(torch.randperm(count, generator=generator)[place]))
        return chosen

    @torch.no_grad()
    def _inputs(self, index: int) -> tuple[Tensor, Tensor]:
        """The student's prefix states and the teacher's features of a window, cached."""
        if index in self._cache:
            return self._cache[index]
        ids = self.windows[index][None]
        states = self.teacher_network.prefix(ids)
        target = self.teacher_network.features(states)
        if not self.shared_prefix:
            states = self.student_network.prefix(ids)
        size = sum(tensor.numel() * tensor.element_size() for tensor in (states, target))
        if self._cached_bytes + size <= _CACHE_BYTES:
            self._cache[index] = (states, target)
            self._cached_bytes += size
        return states, target

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step of the stage; its record for the log, without the step's number.

        Raises:
            ValueError: the loss is not finite.
        """
        config, began = self.config, time.perf_counter()
        temperature = temperature_at(
            step, config.steps, t_init=self.t_init, t_min=config.t_min, schedule=config.schedule
        )
        lr = learning_rate_at(step, config.steps, lr=config.lr, warmup=config.warmup)
        for group, layer in zip(self.optimizer.param_groups, self.layers.values(), strict=True):
            group["lr"] = lr * math.sqrt(layer.codebook_variance)
        if config.reencode_every and step and step % config.reencode_every == 0:
            for layer in self.layers.values():
                layer.reencode()
        for layer in self.layers.values():
            layer.temperature = temperature
        inputs = [self._inputs(index) for index in self._batch(step)]
        loss = forward_kl(
            self.student_network.features(torch.cat([states for states, _ in inputs])),
            self.student_network.head,
            torch.cat([target for _, target in inputs]),
            self.teacher_network.head,
            chunk=_CHUNK,
        )
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"the loss is {float(loss.detach())} at step {step}; lower lr or raise t_min"
            )
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [layer.latent.grad for layer in self.layers.values()]
        norm = torch.stack([g.double().norm() for g in gradients if g is not None]).norm()
        self.optimizer.step()
        record: dict[str, Any] = {
            "loss": float(loss.detach()),
            "temperature": temperature,
            "lr": lr,
            "grad_norm": float(norm),
        }
        last = step == config.steps - 1
        if config.measure_every and (step % config.measure_every == 0 or last):
            measured = {name: measure(layer) for name, layer in self.layers.items()}
            tiles = [(self.layers[name].layer.tiles, drift) for name, drift in measured.items()]
            record |= asdict(combine(tiles))
            record["layers"] = {name: asdict(drift) for name, drift in measured.items()}
        record["step_seconds"] = time.perf_counter() - began
        return record

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            moments = self.optimizer.state[layer.latent]
            tensors[f"{name}.latent"] = layer.latent
            tensors[f"{name}.pins"] = layer.pins
            for key in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"{name}.{key}"] = moments[key]
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what ``state`` gave."""
        for name, layer in self.layers.items():
            layer.latent.copy_(tensors[f"{name}.latent"])
            layer.pins.copy_(tensors[f"{name}.pins"])
            self.optimizer.state[layer.latent] = {
                key: tensors[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step")
            }

    def harden(self) -> dict[str, float]:
        """Exchanges the trained layers for inference layers; the share of changed codes."""
        changed: dict[str, float] = {}
        for name, layer in self.layers.items():
            differs = layer.hard_states() != layer.start
            changed[name] = float(differs.double().mean())
        replace_modules(self.student, self.names, lambda name, _: self.layers[name].harden())
        return changed
