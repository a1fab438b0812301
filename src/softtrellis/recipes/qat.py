"""BCJR-QAT: distillation from the full-precision model, through the trellis."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn

from softtrellis.backend import Backend, ComputeType, check_device, compute_dtype
from softtrellis.io.checkpoint import (
    check_base,
    load_full_precision,
    load_quantized,
    load_tokenizer,
    read_manifest,
)
from softtrellis.io.manifest import TUNING
from softtrellis.modules.replace import (
    decoder_index,
    on_device,
    prepare_for_layers_,
    quantized_layers,
    select_layers,
    share_codebooks_,
)
from softtrellis.quantizers.soft import MIX, Estimator, check_estimator
from softtrellis.recipes.calibration import check_finite
from softtrellis.recipes.optimizer import OptimizerName, check_installed, check_optimizer
from softtrellis.recipes.ranks import ONE, Ranks, shard_frozen_
from softtrellis.recipes.run_state import digest
from softtrellis.recipes.schedules import FINAL_LR_SHARE, TemperatureSchedule, check_schedule
from softtrellis.recipes.seeds import check_seed
from softtrellis.recipes.stages import DistillResult, Run
from softtrellis.recipes.teacher_text import is_mixture
from softtrellis.recipes.trainables import TABLE, check_tables, check_trainable
from softtrellis.recipes.training_text import training_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

Mode = Literal["single", "greedy", "joint"]

NEAR_START, MOVED_START = 0.5, 0.25
"""Where latents start by default, and where they do if weights have moved since PTQ."""

_FREE_TO_CHANGE = (
    "backend",
    "show_progress",
    "save_every",
    "save_minutes",
    "data",
    "tensorboard",
    "micro_batch",
)


@dataclass(frozen=True)
class DistillConfig:
    """How a quantized model is trained.

    Temperatures are in units of the weights' variance, the learning rate of latent weights in
    units of their standard deviation, the others over the root mean square of each tensor.

    Attributes:
        layers: which quantized layers are trained, see ``select_layers``; None is all.
        mode: "joint" trains all of ``layers`` at once; "greedy" one decoder layer after the
            other, each with the earlier ones hardened; "single" some layers, which ``layers`` has
            to name, at once and with the rest of the model frozen as it is.
        estimator: "soft", "straight_through", "mixed" or "identity", see ``estimate``.
        mix: the share of the Boltzmann average's gradient in that of "mixed"; only with it.
        bcjr_stride: one tile in so many has the estimator in a step, in turn, the others have
            "identity": BCJR, which is most of the time of a step, takes so many times less. Not
            with "identity" alone.
        finish: another estimator for the end of the run, or None.
        finish_share: the share of the run that ``finish`` takes, above 0; only with ``finish``.
        start: how far from the codewords towards the original weights latents start, 0 to 1, if
            they are trained; "auto" is 0.5, but 0.25 from a checkpoint that was tuned as it was
            quantized, or trained, whose weights have moved. A loaded model does not say what was
            done to it: of one whose weights have moved, give it.
        train: what changes: "latents", "scales" (of input and output channels), "norms" (with
            biases), "table" (of "hyb").
        t_init: temperature of the first step; "auto" is twice the measured quantization error.
        t_min: temperature of the last step.
        schedule: "exponential" or "cosine".
        lr: peak learning rate of the latents; "auto" is the one with which gradients of random
            sign would move them by 0.14 over the run, see ``rate_of_walk``.
        lr_end: what all rates end at, half a cosine down, over their peaks.
        scale_lr: of scales, norms and biases.
        table_lr: of the table.
        optimizer: "adamw", or "adamw8bit", whose moments take a byte each (torchao).
        clip: gradients of a larger norm are scaled down to it; None never.
        steps: optimizer steps; in mode "greedy" for each decoder layer. None is no limit.
        minutes: ends the run, with its schedules, after so much time on the clock; None is no
            limit. Schedules begin when the first step, which compiles, has ended. Such runs depend
            on the machine's speed.
        warmup: steps of linear warm-up.
        batch: windows per step.
        micro_batch: windows that pass the model at once; None is ``batch``.
        ctx: tokens per window; None is 1024, or all positions of a model that has fewer.
        data: texts, see ``load_documents``; or "teacher" for text that it writes; or both, mixed.
        windows: at most so many windows are used; None is all there are.
        teacher_share: of the windows of a mixture, those that the teacher writes, above 0 and below
            1; None is 0.5. The text gives the rest, and what is held out. Where it has fewer
            windows, or ``windows`` is None, it gives all of them, and the teacher so many that they
            are this share.
        shift_windows: after the first epoch cut the text into windows elsewhere, see
            ``TrainingWindows``; None is where the first decoder layer is trained: no earlier one
            has to run again then, only the teacher.
        held_out: at most so many windows of the text's last documents, which are not trained on
            (``hold_out``), choose the step whose code is kept; 0 keeps the last one's. Of a
            run's last steps, 0.004 nats apart, 16 windows of 512 tokens took a worse one in 0.5%
            of draws, 8 in 3.5%, for 1.6% of the run's time instead of 0.8% (stories260k).
        evaluate_every: steps between evaluations on them, and after the last one; 0 never.
        checkpoint_layers: decoder layers recompute their activations in the backward pass.
        compile: run both models' decoder layers through ``torch.compile``, which takes about a
            minute at the start, for faster steps on a GPU; on one rank only.
        cuda_graphs: repeat passes as CUDA graphs, from the fourth of a shape on: faster where a
            step has so few tokens that launching it takes longer than running it. On a GPU and one
            rank only, and without ``checkpoint_layers``.
        viterbi_every: steps between searches for the hard codes that estimator "identity" takes;
            in between it keeps them, which change slowly. On one rank only unless 1.
        reencode_every: steps between moves of the pinned ends; 0 never moves them.
        measure_every: steps between measurements of drift and codes; 0 measures nothing.
        save_every: steps between saved states, for resuming; 0 leaves that to ``save_minutes``.
        save_minutes: time between saved states; 0 leaves them to ``save_every``.
        seed: of the order of the windows.
        device: where both models run.
        dtype: that their matrix products are computed in, and that ranks exchange codewords in:
            "bfloat16" or "float32"; "auto" is the first on a GPU, the second on a CPU. Latents,
            their gradients, logits and sums are float32.
        backend: of Viterbi and BCJR.
        tensorboard: also write the log for TensorBoard, into ``run_directory``.
        show_progress: show progress bars.
    """

    layers: tuple[str, ...] | None = None
    mode: Mode = "joint"
    estimator: Estimator = "identity"
    mix: float = MIX
    bcjr_stride: int = 1
    finish: Estimator | None = None
    finish_share: float = 0.2
    start: float | Literal["auto"] = "auto"
    train: tuple[str, ...] = ("latents", "scales", "norms")
    t_init: float | Literal["auto"] = 0.2
    t_min: float = 0.03
    schedule: TemperatureSchedule = "exponential"
    lr: float | Literal["auto"] = "auto"
    lr_end: float = FINAL_LR_SHARE
    scale_lr: float = 5e-3
    table_lr: float = 1e-3
    optimizer: OptimizerName = "adamw"
    clip: float | None = None
    steps: int | None = 240
    minutes: float | None = None
    warmup: int = 5
    batch: int = 16
    micro_batch: int | None = None
    ctx: int | None = None
    data: tuple[str, ...] = ("pydoc",)
    windows: int | None = None
    teacher_share: float | None = None
    shift_windows: bool | None = None
    held_out: int = 16
    evaluate_every: int = 20
    checkpoint_layers: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    viterbi_every: int = 1
    reencode_every: int = 25
    measure_every: int = 5
    save_every: int = 0
    save_minutes: float = 3.0
    seed: int = 0
    device: str = "cpu"
    dtype: ComputeType = "auto"
    backend: Backend = "auto"
    tensorboard: bool = False
    show_progress: bool = False

    def __post_init__(self) -> None:
        check_estimator(self.estimator)
        if self.finish is not None:
            check_estimator(self.finish)
        check_schedule(self.schedule)
        check_optimizer(self.optimizer)
        check_trainable(self.train)
        check_device(self.device)
        check_seed(self.seed)
        compute_dtype(self.dtype, self.device)
        self._check_mixture()
        if self.mode not in get_args(Mode):
            raise ValueError(f"unknown mode {self.mode!r}; use one of {', '.join(get_args(Mode))}")
        if self.mode == "single" and self.layers is None:
            raise ValueError(
                "layers must name some layers in mode 'single', which trains only these; "
                "mode 'joint' trains all"
            )
        for name in ("t_init", "t_min", "lr", "scale_lr", "table_lr", "clip", "minutes"):
            value = getattr(self, name)
            if (name in ("t_init", "lr") and value == "auto") or value is None:
                continue
            if not isinstance(value, float | int) or not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.t_init != "auto" and self.t_min > self.t_init:
            raise ValueError(
                f"t_min must not be above t_init, got {self.t_min} and {self.t_init}; "
                "the temperature falls from t_init to t_min"
            )
        if self.viterbi_every > 1 and "identity" not in (self.estimator, self.finish):
            raise ValueError(
                "viterbi_every must be left out where neither the estimator nor the finish is "
                "'identity'"
            )
        if self.cuda_graphs and (self.checkpoint_layers or not self.device.startswith("cuda")):
            raise ValueError("cuda_graphs must be left out on a CPU, and with checkpoint_layers")
        if self.steps is None and self.minutes is None:
            raise ValueError("a run needs an end: give steps or minutes")
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("micro_batch", 1),
            ("ctx", 2),
            ("warmup", 0),
            ("windows", 1),
            ("viterbi_every", 1),
            ("bcjr_stride", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        intervals = ("reencode_every", "measure_every", "evaluate_every", "save_every")
        for name in (*intervals, "save_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (never) or more, got {getattr(self, name)}")
        if self.held_out < 0:
            raise ValueError(f"held_out must be 0 or more windows, got {self.held_out}")
        for name in ("start", "mix", "finish_share", "lr_end"):
            value = getattr(self, name)
            if name == "start" and value == "auto":
                continue
            if not isinstance(value, float | int) or not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")
        estimators = {self.estimator, self.finish} - {None}
        if "mixed" not in estimators and self.mix != MIX:
            raise ValueError(f"mix must be left out where no estimator is 'mixed', got {self.mix}")
        if estimators == {"identity"} and self.bcjr_stride != 1:
            raise ValueError(
                f"bcjr_stride must be left out with 'identity' alone, got {self.bcjr_stride}"
            )
        if self.finish is None and self.finish_share != DistillConfig.finish_share:
            raise ValueError(
                f"finish_share must be left out where no finish is named, got {self.finish_share}"
            )
        if self.finish is not None and self.finish_share == 0:
            raise ValueError(
                f"finish_share must be above 0 with finish {self.finish!r}, which would not be used"
            )

    def _check_mixture(self) -> None:
        mixed, share = is_mixture(self.data), self.teacher_share
        if share is not None and not mixed:
            raise ValueError(
                "teacher_share must be left out where the data are not 'teacher' and other text, "
                f"got {share}"
            )
        if share is not None and not 0 < share < 1:
            raise ValueError(f"teacher_share must be above 0 and below 1, got {share}")
        if mixed and self.windows == 1:
            raise ValueError("windows must be at least 2 where the teacher writes some, got 1")


def with_start(config: DistillConfig, provenance: Mapping[str, Any]) -> DistillConfig:
    """The config with a number for start "auto", of a checkpoint with this provenance."""
    if config.start != "auto":
        return config
    moved = not {*TUNING, "train"}.isdisjoint(provenance)
    return replace(config, start=MOVED_START if moved else NEAR_START)


def distill(
    model: str | Path | PreTrainedModel,
    config: DistillConfig,
    *,
    teacher: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: tuple[Tensor, Tensor] | None = None,
    run_directory: Path | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> DistillResult:
    """Trains a quantized model towards its full-precision teacher (BCJR-QAT, section 4).

    Args:
        model: a checkpoint's directory, or a loaded quantized model, which is changed in place.
        config: see ``DistillConfig``.
        teacher: the full-precision model it was made from: loaded, or what ``load_source`` takes.
            Of a loaded one, ``Conv1D`` layers and fused experts that are trained become plain
            linear layers, in place; its outputs stay the same to rounding.
        tokenizer: needed when both models are loaded ones, unless there is ``text``.
        text: windows of tokens int64 [n, ctx] to train on, and [m, ctx] that choose the step whose
            code is kept (m may be 0), in the place of ``config.data``.
        run_directory: where ``log.jsonl`` and the state for resuming go; None writes nothing.
        resume: go on from the state in ``run_directory``, to the weights that an uninterrupted
            run gives on a CPU, unless ``minutes`` ends it.
        ranks: the processes that train it together, each calling this with the same arguments
            (see ``join``). Each takes its part of the windows of a batch, and of the tiles of every
            layer. The teacher's decoder layers are spread over them, in place. Rank 0 alone writes
            into ``run_directory``, which all of them read. None is this process alone.

    Returns:
        DistillResult, on every rank; ``save_quantized`` stores its model.

    Raises:
        ValueError: unknown layers, layers that are not quantized, or text shorter than a window.
        CheckpointError: a checkpoint that is damaged or was made from another model.
        ImportError: a package that the config asks for is missing.
    """
    ranks = ranks or ONE
    if ranks.size > 1 and config.optimizer == "adamw8bit":
        raise ValueError("optimizer adamw8bit trains on one rank only; use adamw")
    alone = {"compile": config.compile, "cuda_graphs": config.cuda_graphs}
    alone["viterbi_every"] = config.viterbi_every > 1
    for name, wanted in alone.items():
        if ranks.size > 1 and wanted:
            raise ValueError(f"{name} trains on one rank only; leave it out")
    check_installed(config.optimizer)
    if not ranks.first:
        config = replace(config, show_progress=False)
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
    config = with_start(config, {} if manifest is None else manifest.provenance)
    if tokenizer is None and isinstance(model, str | Path):
        tokenizer = load_tokenizer(model)
    if tokenizer is None and text is None:
        raise ValueError("loaded models need their tokenizer: distill(..., tokenizer=)")
    names = _trained_layers(student, config.layers)
    stages = _stages(student, names, config.mode)
    if TABLE in config.train:
        for stage in stages:
            check_tables(stage, quantized_layers(student))
    prepare_for_layers_(teacher, names)
    if text is None:
        assert tokenizer is not None
        text = ranks.once(partial(training_windows, config, teacher, tokenizer))
    check_finite(teacher)
    settings = {k: v for k, v in asdict(config).items() if k not in _FREE_TO_CHANGE}
    quantized = quantized_layers(student).values()
    settings["checkpoint"] = digest(t for layer in quantized for t in (layer.codes, layer.scale))
    settings["text"] = digest(text)
    shard_frozen_(teacher, ranks)  # on the device: it never lies there whole
    with on_device(student, config.device), on_device(teacher, config.device):
        run = Run(
            student, teacher, text, config, settings, run_directory, resume=resume, ranks=ranks
        )
        result = run.train(stages)
    share_codebooks_(student)
    return result


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
    """The layers of every stage: "joint" and "single" have one of all names."""
    if mode != "greedy":
        return [list(names)]
    by_layer: dict[int, list[str]] = {}
    for name in names:
        by_layer.setdefault(decoder_index(model, name), []).append(name)
    return [by_layer[index] for index in sorted(by_layer)]
