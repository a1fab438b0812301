"""BCJR-QAT: distillation from the full-precision model, through the trellis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn

from softtrellis.backend import Backend
from softtrellis.io.checkpoint import (
    check_base,
    load_full_precision,
    load_quantized,
    load_tokenizer,
    read_manifest,
)
from softtrellis.io.progress import progress
from softtrellis.io.text import load_documents, token_windows
from softtrellis.modules.replace import (
    decoder_index,
    prepare_for_layers_,
    quantized_layers,
    select_layers,
)
from softtrellis.quantizers.soft import Estimator, check_estimator
from softtrellis.recipes.calibration import check_finite
from softtrellis.recipes.run_state import RunLog, digest, load_state, save_state
from softtrellis.recipes.schedules import TemperatureSchedule, check_schedule
from softtrellis.recipes.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Mode = Literal["single", "greedy", "joint"]
_FREE_TO_CHANGE = ("backend", "show_progress", "save_every", "data")


@dataclass(frozen=True)
class DistillConfig:
    """How a quantized model is trained.

    Temperatures are in units of the weights' variance, learning rates in units of their standard
    deviation.

    Attributes:
        layers: which quantized layers are trained, see ``select_layers``; None is all.
        mode: "joint" trains all at once; "greedy" one decoder layer after the other, each with
            the earlier ones hardened; "single" trains exactly one decoder layer.
        estimator: "soft", "straight_through" or "identity", see ``estimate``.
        t_init: temperature of the first step; "auto" is twice the measured quantization error.
        t_min: temperature of the last step.
        schedule: "exponential" or "cosine".
        lr: peak learning rate of AdamW.
        steps: optimizer steps; in mode "greedy" for each decoder layer.
        warmup: steps of linear warm-up.
        batch: windows per step.
        ctx: tokens per window.
        data: texts, see ``load_documents``.
        windows: at most so many windows are used; None is all there are.
        reencode_every: steps between moves of the pinned ends; 0 never moves them.
        measure_every: steps between measurements of drift and codes; 0 measures nothing.
        save_every: steps between saved states, for resuming; 0 saves none.
        seed: of the order of the windows.
        backend: of Viterbi and BCJR.
        show_progress: show progress bars.
    """

    layers: tuple[str, ...] | None = None
    mode: Mode = "joint"
    estimator: Estimator = "soft"
    t_init: float | Literal["auto"] = 0.1
    t_min: float = 0.03
    schedule: TemperatureSchedule = "exponential"
    lr: float = 1e-2
    steps: int = 100
    warmup: int = 5
    batch: int = 4
    ctx: int = 512
    data: tuple[str, ...] = ("pydoc",)
    windows: int | None = None
    reencode_every: int = 25
    measure_every: int = 5
    save_every: int = 10
    seed: int = 0
    backend: Backend = "auto"
    show_progress: bool = False

    def __post_init__(self) -> None:
        check_estimator(self.estimator)
        check_schedule(self.schedule)
        if self.mode not in get_args(Mode):
            raise ValueError(f"unknown mode {self.mode!r}; use one of {', '.join(get_args(Mode))}")
        for name in ("t_init", "t_min", "lr"):
            value = getattr(self, name)
            if name == "t_init" and value == "auto":
                continue
            if not isinstance(value, float | int) or not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.t_init != "auto" and self.t_min > self.t_init:
            raise ValueError(
                f"t_min must not be above t_init, got {self.t_min} and {self.t_init}; "
                "the temperature falls from t_init to t_min"
            )
        for name, least in (("steps", 1), ("batch", 1), ("ctx", 2), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"windows must be at least 1, got {self.windows}")
        for name in ("reencode_every", "measure_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (never) or more, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class DistillResult:
    """What training gave.

    Attributes:
        model: with the trained layers hardened to ``QuantizedLinear``.
        history: one record per step, as in ``log.jsonl``.
        changed_codes: share of trellis steps whose state differs from the start's, by layer.
    """

    model: PreTrainedModel
    history: list[dict[str, Any]]
    changed_codes: dict[str, float]


def distill(
    model: str | Path | PreTrainedModel,
    config: DistillConfig,
    *,
    teacher: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run_directory: Path | None = None,
    resume: bool = False,
) -> DistillResult:
    """Trains a quantized model towards its full-precision teacher (BCJR-QAT, section 4).

    Args:
        model: a checkpoint's directory, or a loaded quantized model, which is changed in place.
        config: see ``DistillConfig``.
        teacher: the full-precision model it was made from: loaded, or what ``load_source`` takes.
            Of a loaded one, ``Conv1D`` layers and fused experts that are trained become plain
            linear layers, in place; its outputs stay the same to rounding.
        tokenizer: needed when both models are loaded ones.
        run_directory: where ``log.jsonl`` and the state for resuming go; None writes nothing.
        resume: go on from the state in ``run_directory``, to the weights that an uninterrupted
            run gives.

    Returns:
        DistillResult; ``save_quantized`` stores its model.

    Raises:
        ValueError: unknown layers, layers that are not quantized, or text shorter than a window.
        CheckpointError: a checkpoint that is damaged or was made from another model.
    """
    if isinstance(model, str | Path):
        manifest = read_manifest(Path(model))
        student = load_quantized(model)
    else:
        manifest, student = None, model
    if isinstance(teacher, str | Path):
        source = load_full_precision(str(teacher))
        teacher, tokenizer = source.model, tokenizer or source.tokenizer
    if manifest is not None:
        check_base(manifest, teacher)
    if tokenizer is None and isinstance(model, str | Path):
        tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise ValueError("loaded models need their tokenizer: distill(..., tokenizer=)")
    names = _trained_layers(student, config.layers)
    stages = _stages(student, names, config.mode)
    prepare_for_layers_(teacher, names)
    documents = load_documents(config.data, split="train")
    windows = token_windows(tokenizer, documents, config.ctx, limit=config.windows)
    check_finite(teacher)
    settings = {k: v for k, v in asdict(config).items() if k not in _FREE_TO_CHANGE}
    quantized = quantized_layers(student).values()
    settings["checkpoint"] = digest(t for layer in quantized for t in (layer.codes, layer.scale))
    settings["text"] = digest([windows])
    done, state = 0, dict[str, Tensor]()
    if resume and run_directory is not None:
        done, state = load_state(run_directory, settings=settings)
    log = RunLog(run_directory, resume_at=done)
    hardened: dict[str, Tensor] = {}
    changed: dict[str, float] = {}
    total = len(stages) * config.steps
    with progress(total, "train", enabled=config.show_progress) as bar:
        bar.update(done)
        for index, stage in enumerate(stages):
            trainer = Trainer(student, teacher, stage, windows, config)
            first = index * config.steps
            if done > first:
                trainer.restore({k: state[k] for k in state if k.rpartition(".")[0] in stage})
            for step in range(max(done, first), first + config.steps):
                record = {"step": step, **trainer.step(step - first)}
                record["seconds"] = log.seconds + record.pop("step_seconds")
                log.append(record)
                bar.set_postfix(loss=f"{record['loss']:.4f}", T=f"{record['temperature']:.3f}")
                bar.update()
                every = config.save_every
                if run_directory is not None and every and (step + 1) % every == 0:
                    tensors = hardened | trainer.state()
                    save_state(run_directory, tensors, step=step + 1, settings=settings)
            hardened |= {key: t.clone() for key, t in trainer.state().items()}
            changed |= trainer.harden()
    return DistillResult(student, log.records, changed)


def _trained_layers(model: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    quantized = quantized_layers(model)
    if not quantized:
        raise ValueError("the model has no quantized layers; make some with quantize_model")
    if patterns is None:
        return list(quantized)
    names = select_layers(model, patterns)
    dense = [name for name in names if name not in quantized]
    if dense:
        raise ValueError(f"{dense[0]} is not quantized; quantize it first or leave it out")
    return names


def _stages(model: nn.Module, names: Sequence[str], mode: Mode) -> list[list[str]]:
    by_layer: dict[int, list[str]] = {}
    for name in names:
        by_layer.setdefault(decoder_index(model, name), []).append(name)
    if mode == "greedy":
        return [by_layer[index] for index in sorted(by_layer)]
    if mode == "single" and len(by_layer) > 1:
        raise ValueError(
            f"mode 'single' trains one decoder layer, {len(by_layer)} are chosen; "
            "name one with layers, or use mode 'joint' or 'greedy'"
        )
    return [list(names)]
