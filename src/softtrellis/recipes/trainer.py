"""One stage of training: some layers through their trellis, all others frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softtrellis.backend import compute_dtype
from softtrellis.modules.latent_linear import (
    LatentLinear,
    find_codes,
    hard_states,
    hold,
    reencode,
    release,
    searching,
)
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import (
    decoder_index,
    get_linear,
    get_quantized,
    hold_weights_,
    quantized_layers,
    release_weights_,
    replace_modules,
)
from softtrellis.recipes.drift import SAMPLED_TILES, combine, measure_all, over_ranks
from softtrellis.recipes.network import wrap_layers_
from softtrellis.recipes.objective import Objective
from softtrellis.recipes.optimizer import (
    gradient_norm,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    scale_gradients_,
    set_learning_rates,
)
from softtrellis.recipes.ranks import ONE, Ranks, whole_weight
from softtrellis.recipes.replay import FixedPlaces
from softtrellis.recipes.schedules import temperature_at
from softtrellis.recipes.sharded_layers import ShardedLayers
from softtrellis.recipes.sharded_state import spread
from softtrellis.recipes.temperatures import check_temperatures, initial_temperature
from softtrellis.recipes.trainables import (
    LATENTS,
    TABLE,
    LearningRates,
    shared_tables,
    trained_parameters,
)
from softtrellis.recipes.training_text import TrainingWindows
from softtrellis.trellis.memory import halvings
from softtrellis.trellis.packing import pack, unpack

if TYPE_CHECKING:
    from softtrellis.recipes.qat import DistillConfig

_MEASURED_TILES = 4096
_MOST_SKIPPED = 10
START = -1
"""The step of the code that training starts from, where steps are compared."""


class Trainer:
    """Trains the named layers of a student together, towards a teacher.

    Attributes:
        layers: the training layers by name.
        rates: of learning.
        best: the least divergence on held-out windows so far, of the hard code, and its step.
        skipped: steps without a finite gradient, which changed nothing.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        names: Sequence[str],
        windows: Tensor,
        held_out: Tensor,
        config: DistillConfig,
        ranks: Ranks = ONE,
    ) -> None:
        """Puts training layers into the student.

        Args:
            student: the quantized model, on the device of the training.
            teacher: the original one, likewise.
            names: of the layers that are trained.
            windows: int64 [n, ctx], for training.
            held_out: int64 [m, ctx], to choose the best step by; m may be 0.
            config: see ``DistillConfig``.
            ranks: that train it together, each on its windows of a batch and its tiles of every
                layer; they call all methods together.
        """
        self.student, self.names, self.config, self.ranks = student, names, config, ranks
        self.held_out = held_out
        place = partial(decoder_index, student)
        first = min(map(place, names))
        shift = first == 0 if config.shift_windows is None else config.shift_windows
        self._text = TrainingWindows(windows, config.batch, config.seed, shift=shift)
        cuda, several = next(student.parameters()).is_cuda, ranks.size > 1
        dtype = compute_dtype(config.dtype, config.device)
        self._sharded = ShardedLayers(student, names, ranks, dtype=dtype) if several else None
        self._objective = Objective(
            student, teacher, first, self._text, held_out, ranks, self._sharded,
            dtype=dtype, graphs=config.cuda_graphs,
        )  # fmt: skip
        student.requires_grad_(False)
        self.t_init = initial_temperature(config, teacher, student, names)
        check_temperatures(map(partial(get_quantized, student), names), self.t_init, config.t_min)
        self.layers: dict[str, LatentLinear] = {}
        for _, members in groupby(sorted(names, key=place), place):
            replace_modules(student, members, self._make_layer)
            if self._sharded is not None:
                self._sharded.shard()
        self._move_to_start(teacher)
        hold_weights_(student, torch.float32)  # the frozen layers', not in every pass
        self._unwrap = [
            wrap_layers_(student, compiled=config.compile, recomputed=config.checkpoint_layers),
            wrap_layers_(teacher, compiled=config.compile),
        ]
        with_table = TABLE in config.train
        self.tables = shared_tables(self.layers, quantized_layers(student)) if with_table else []
        self.parameters = trained_parameters(student, self.layers, self.tables, config.train)
        self._fixed = FixedPlaces(self.layers, self.parameters, enabled=config.cuda_graphs)
        self.rates = LearningRates(self.parameters, self.layers, config)
        self.optimizer = make_optimizer(config.optimizer, self.rates.groups, fused=cuda)
        self.best: tuple[float, int] | None = None
        self._kept: dict[str, Tensor] = {}
        self.skipped = 0

    def _make_layer(self, name: str, module: nn.Module) -> LatentLinear:
        assert isinstance(module, QuantizedLinear)
        config = self.config
        layer = LatentLinear.from_quantized(
            module, estimator=config.estimator, mix=config.mix, bcjr_stride=config.bcjr_stride,
            temperature=self.t_init, backend=config.backend, mesh=self.ranks.mesh,
        )  # fmt: skip
        if layer.codewords is not None:
            layer.codewords.requires_grad_(not {LATENTS, TABLE}.isdisjoint(self.config.train))
        self.layers[name] = layer
        return layer

    @torch.no_grad()
    def _move_to_start(self, teacher: nn.Module) -> None:
        """Part of the way from the codewords to the original weights."""
        start = float(self.config.start)  # not "auto", see with_start
        moved = self.layers if start and LATENTS in self.config.train else {}
        for name, layer in moved.items():
            weight = whole_weight(get_linear(teacher, name)).float()
            layer.latent.lerp_(layer.own(layer.basis.to_latent(weight)), start)

    def step(self, step: int, share: float) -> dict[str, Any]:
        """One optimizer step of the stage; its record for the log, without the step's number.

        Args:
            step: counts from 0.
            share: of the stage that is done, from 0 to 1, which is the last step.

        Raises:
            ValueError: no finite gradient for several steps in a row.
        """
        config, layers = self.config, list(self.layers.values())
        temperature = self._set_schedule(step, share)
        if config.reencode_every and step and step % config.reencode_every == 0:
            reencode(layers)
        kept = config.viterbi_every > 1 and layers[0].estimator == "identity"
        if kept and step % config.viterbi_every == 0:
            find_codes(layers)
        rows, losses = self._text.rows(step), list[Tensor]()
        size = config.micro_batch or config.batch
        with torch.enable_grad():
            for table in self.tables:
                table.hold()
            hold(layers)
            self._fixed.reset()
            for part in self._objective.parts(rows, size):
                loss = self._objective.backward(part, len(part) / len(rows))
                losses.append(loss.double())  # read at the end: reading waits for the GPU
            release(layers)
            for table in self.tables:
                table.release()
        (total,) = self.ranks.sum(float(sum(losses)))
        norm = self._reduce_gradients()
        finite = math.isfinite(total) and math.isfinite(float(norm))
        self.skipped = 0 if finite else self.skipped + 1
        if finite:
            self._clip(float(norm))
            self.optimizer.step()
        elif self.skipped >= _MOST_SKIPPED:
            raise ValueError(
                f"no finite gradient for {_MOST_SKIPPED} steps, loss {total} at step {step}; "
                "lower lr or raise t_min"
            )
        self.optimizer.zero_grad()
        record: dict[str, Any] = {
            "loss": total,
            "temperature": temperature,
            "lr": self.rates.of_latents(share, step),
            "grad_norm": float(norm),
            "tokens": (step + 1) * config.batch * self._text.first.shape[1],
        }
        if not finite:
            record["skipped"] = self.skipped
        if halvings():
            record["memory_halvings"] = halvings()
        every = config.measure_every
        if every and (step % every == 0 or share >= 1):
            record |= self._drift()
        every = config.evaluate_every
        if len(self.held_out) and every and ((step + 1) % every == 0 or share >= 1):
            record |= self.evaluate(step)
        return record

    def _set_schedule(self, step: int, share: float) -> float:
        config = self.config
        finishing = config.finish is not None and share > 1 - config.finish_share
        temperature = temperature_at(
            share, t_init=self.t_init, t_min=config.t_min, schedule=config.schedule
        )
        set_learning_rates(self.optimizer, self.rates.at(share, step))
        for layer in self.layers.values():
            layer.temperature, layer.turn = temperature, step
            layer.estimator = (config.finish or config.estimator) if finishing else config.estimator
        return temperature

    def _reduce_gradients(self) -> Tensor:
        """Adds up what the ranks found for parameters that all of them have; the norm of all."""
        sharded = {id(layer.latent) for layer in self.layers.values() if layer.share is not None}
        own = [p for p in self.parameters.values() if id(p) in sharded]
        common = [p for p in self.parameters.values() if id(p) not in sharded]
        if self.ranks.size == 1:
            return gradient_norm(common)
        found = self.ranks.any(*(p.grad is not None for p in common))
        for parameter, anywhere in zip(common, found, strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.sum_(p.grad for p in common if p.grad is not None)
        (squared,) = self.ranks.sum(float(gradient_norm(own)) ** 2)
        return (squared + gradient_norm(common) ** 2).sqrt()

    def _clip(self, norm: float) -> None:
        if self.config.clip is not None and norm > self.config.clip:
            scale_gradients_(self.parameters.values(), self.config.clip / norm)

    def _drift(self) -> dict[str, Any]:
        tiles = max(1, min(SAMPLED_TILES, _MEASURED_TILES // len(self.layers)))
        measured = measure_all(self.layers, tiles)
        if self.ranks.size > 1:
            measured = over_ranks(self.layers, measured, tiles, self.ranks)
        counted = [(self.layers[name].layer.tiles, drift) for name, drift in measured.items()]
        layers = {name: asdict(drift) for name, drift in measured.items()}
        return asdict(combine(counted)) | {"layers": layers}

    @torch.no_grad()
    def _divergence(self) -> float:
        """KL(teacher || student) per token on the held-out windows, with the weights held."""
        size = self.config.micro_batch or self.config.batch
        parts = self._objective.parts(range(len(self.held_out)), size)
        own = sum(len(part) * float(self._objective.loss(part, held_out=True)) for part in parts)
        (total,) = self.ranks.sum(own)
        return total / len(self.held_out)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Divergences on the held-out windows, as trained and hardened; keeps the best hard code.

        Returns:
            ``heldout_kl`` and ``heldout_kl_hard``, in nats per token.
        """
        layers = list(self.layers.values())
        for table in self.tables:
            table.hold()
        with searching(layers):
            hold(layers)
        soft = self._divergence()
        return {"heldout_kl": soft, "heldout_kl_hard": self._judge(self._harden(), step)}

    @torch.no_grad()
    def evaluate_start(self) -> dict[str, float]:
        """``heldout_kl_start`` of the code that training starts from, so that no worse is kept.

        In nats per token; nothing where no step will be evaluated.
        """
        if not len(self.held_out) or not self.config.evaluate_every:
            return {}
        for table in self.tables:
            table.hold()
        start = {name: layer.harden(layer.start_states()) for name, layer in self.layers.items()}
        return {"heldout_kl_start": self._judge(start, START)}

    def _judge(self, hardened: dict[str, QuantizedLinear], step: int) -> float:
        """The divergence of a step's hard code, which is kept if it is the best so far."""
        for name, layer in self.layers.items():
            layer.hold_hard(hardened[name])
        divergence = self._divergence()
        release(self.layers.values())
        if math.isfinite(divergence) and (self.best is None or divergence < self.best[0]):
            self.best, self._kept = (divergence, step), self._snapshot(hardened)
        return divergence

    def _harden(self) -> dict[str, QuantizedLinear]:
        names = {id(layer): name for name, layer in self.layers.items()}
        found = hard_states(self.layers.values())
        return {names[id(layer)]: layer.harden(states) for layer, states in found}

    def _snapshot(self, hardened: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
        """All that a step may change of the hard model, on the CPU."""
        tensors: dict[str, Tensor] = {}
        for name, layer in hardened.items():
            tensors |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
        for name, parameter in self.parameters.items():
            if name.rpartition(".")[0] not in self.layers:
                tensors[name] = parameter
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def _best_code(self) -> dict[str, QuantizedLinear]:
        """What ``_snapshot`` kept; other parameters than the layers' become what they were then."""
        for name, parameter in self.parameters.items():
            if name in self._kept:
                parameter.copy_(self._kept[name])
        for table in self.tables:
            table.hold()
        found: dict[str, QuantizedLinear] = {}
        for name, layer in self.layers.items():
            made = QuantizedLinear(layer.layer, layer.codebook.detach()).to(layer.latent.device)
            made.load_state_dict({key: self._kept[f"{name}.{key}"] for key in made.state_dict()})
            found[name] = made
        return found

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes; what ranks share of it as ``DTensor``s."""
        tensors: dict[str, Tensor] = dict(self.parameters)
        for name, layer in self.layers.items():
            tensors[f"{name}.pins"] = layer.pins
            if layer.codes is not None:
                tensors[f"{name}.codes"] = pack(layer.codes, layer.layer.code.spec)
        tensors |= optimizer_tensors(self.optimizer, self.parameters)
        tensors["skipped"] = torch.tensor(self.skipped)
        if self.best is not None:
            tensors |= {f"best/{name}": tensor for name, tensor in self._kept.items()}
            tensors["best"] = torch.tensor(self.best, dtype=torch.float64)
        return spread(tensors, self.layers)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what ``state`` gave, of what ranks share this rank's own part."""
        load_optimizer_tensors(self.optimizer, self.parameters, tensors)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
        for name, layer in self.layers.items():
            layer.pins.copy_(tensors[f"{name}.pins"])
            if (codes := tensors.get(f"{name}.codes")) is not None:
                codes, steps = codes.to(layer.pins.device), layer.start.shape[1]
                layer.codes = unpack(codes, layer.layer.code.spec, steps=steps)
        self.skipped = int(tensors["skipped"])
        if "best" in tensors:
            divergence, step = tensors["best"].tolist()
            self.best = divergence, int(step)
            best = {name: t for name, t in tensors.items() if name.startswith("best/")}
            self._kept = {name.removeprefix("best/"): t.cpu() for name, t in best.items()}

    @torch.no_grad()
    def harden(self) -> dict[str, float]:
        """Exchanges the trained layers for inference layers of the best step, or of the last one.

        The best step may be ``START``.

        Returns:
            The share of changed codes by layer.
        """
        for unwrap in self._unwrap:
            unwrap()
        if self._sharded is not None:
            self._sharded.undo()
        release_weights_(self.student)
        for table in self.tables:
            table.hold()
        hardened = self._harden() if self.best is None else self._best_code()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        changed: dict[str, float] = {}
        for name, layer in hardened.items():
            latent = self.layers[name]
            states = layer.states() if latent.share is None else layer.states()[latent.share.owned]
            (differs,) = self.ranks.sum(float(latent.changed(states).sum()))
            changed[name] = differs / (latent.layer.tiles * states.shape[1])
        replace_modules(self.student, self.names, lambda name, _: hardened[name])
        return changed
