"""Post-training quantization: Hessians, incoherence, LDLQ and tail-biting Viterbi (QTIP)."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from softtrellis import __version__
from softtrellis.backend import Backend, check_device
from softtrellis.io import exl3
from softtrellis.io.checkpoint import load_full_precision
from softtrellis.io.sources import cache_directory, fingerprint
from softtrellis.io.text import stream_documents, token_windows, train_and_held_out_documents
from softtrellis.modules.quantized_linear import LayerFormat
from softtrellis.modules.replace import (
    get_linear,
    on_device,
    prepare_for_layers_,
    quantized_layers,
    select_layers,
)
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.quantizers.ldlq import BLOCK
from softtrellis.recipes.block_ptq import BlockQuantizer
from softtrellis.recipes.calibration import check_finite
from softtrellis.recipes.end_to_end import EndToEndConfig, tune_end_to_end
from softtrellis.recipes.estimate import estimate
from softtrellis.recipes.finetune import FineTuneConfig, held_out_windows
from softtrellis.recipes.group import LayerReport
from softtrellis.recipes.output_hessians import output_hessians
from softtrellis.recipes.progressive import Progressive, ProgressiveConfig
from softtrellis.recipes.ptq_state import LayerStore
from softtrellis.recipes.ranks import ONE, Ranks
from softtrellis.recipes.run_state import digest, sampled
from softtrellis.recipes.seeds import check_seed
from softtrellis.recipes.teacher_text import is_teacher_text, sample_windows
from softtrellis.spec import TILE_SIDE, TrellisSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Profile = Literal["qtip", "exl3"]
Inputs = Literal["corrected", "quantized", "original"]
EXL3_CODES = ("mul1", "mcg", "3inst")
SAMPLED_AT_ONCE = 32
"""Windows, where the model writes its calibration text itself."""

_NUMBERS_AT_ONCE = 1 << 28

_NOT_SETTINGS = ("trellis_code", "data", "show_progress")


@dataclass(frozen=True)
class QuantizeConfig:
    """How a model is quantized.

    Attributes:
        profile: "qtip" (HYB, V=2, full-width Hadamard) or "exl3" (mul1, V=1, Hadamard blocks of
            128, a float16 scale per output channel, EXL3's tile order).
        bits: bits per weight, 1 to 4.
        bits_map: (pattern, bits) for layers with other bits, patterns as in ``select_layers``; the
            last one that matches counts.
        code: see ``codebook``; None is the profile's own.
        L: bits of a trellis state; None is 16, and 8 of "scalar", which has no trellis.
        head_bits: quantize the output layer too, to so many bits; it is no longer tied to the
            embedding then.
        layers: which linear layers, see ``select_layers``; None is all of the decoder layers'.
        skip: layers that stay as they are, patterns likewise.
        data: texts for the Hessians, see ``stream_documents``; or "teacher" alone, text that the
            model itself writes on ``device``, see ``sample_windows``.
        ctx: tokens per calibration window.
        windows: calibration windows.
        batch: windows that a decoder layer takes at once; None is 4 on a CPU, and on a GPU as many
            as have 2**28 numbers at the widest layer's input, at most 32.
        expert_tokens: an expert that saw fewer takes the Hessian of all experts beside it.
        inputs: what the Hessians are taken from, and blocks tuned on: "quantized" is the output of
            the layers before as they are quantized, "original" that of the original ones (QTIP).
            "corrected" is like "quantized", and first gives every weight the values whose outputs
            on these inputs are nearest to the original ones, see ``corrected_weight`` (GPTAQ).
        damping: added to each Hessian's diagonal, as a share of its mean.
        correction_damping: likewise, where weights are corrected.
        output_windows: calibration windows that the Hessians of layers' outputs are taken from;
            LDLQ then feeds errors along outputs too (YAQA), see ``two_sided_ldlq``. 0 is without,
            as in QTIP. The model has to fit on the device, with its activations. An expert that no
            token reached takes the identity.
        output_damping: likewise, of these.
        error_feedback: LDLQ; False is plain Viterbi without Hessians.
        seed: of the random signs.
        device: where decoder layers are quantized, one at a time; on "cuda" they run in bfloat16,
            with float32 states and sums.
        backend: of Viterbi.
        show_progress: show progress bars.
    """

    profile: Profile = "qtip"
    bits: int = 2
    bits_map: tuple[tuple[str, int], ...] = ()
    head_bits: int | None = None
    code: str | None = None
    L: int | None = None
    layers: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    data: tuple[str, ...] = ("pydoc",)
    ctx: int = 512
    windows: int = 32
    batch: int | None = None
    expert_tokens: int = 256
    inputs: Inputs = "corrected"
    damping: float = 0.01
    correction_damping: float = 0.1
    output_windows: int = 0
    output_damping: float = 0.1
    error_feedback: bool = True
    seed: int = 0
    device: str = "cpu"
    backend: Backend = "auto"
    show_progress: bool = False
    trellis_code: TrellisCode = field(init=False)

    def __post_init__(self) -> None:
        if self.profile not in get_args(Profile):
            raise ValueError(f"unknown profile {self.profile!r}; use 'qtip' or 'exl3'")
        if self.inputs not in get_args(Inputs):
            names = ", ".join(get_args(Inputs))
            raise ValueError(f"inputs must be one of {names}, got {self.inputs!r}")
        for name, least in (("ctx", 2), ("windows", 1), ("batch", 1), ("expert_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        check_device(self.device)
        check_seed(self.seed)
        if self.output_windows < 0:
            raise ValueError(f"output_windows must be 0 or more, got {self.output_windows}")
        for name in ("damping", "correction_damping", "output_damping"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        is_teacher_text(self.data)
        object.__setattr__(self, "trellis_code", self._trellis_code())
        if self.head_bits is not None and not 1 <= self.head_bits <= 4:
            raise ValueError(f"head_bits must be from 1 to 4, got {self.head_bits}")
        for pattern, bits in self.bits_map:
            if not 1 <= bits <= 4:
                raise ValueError(f"bits_map must give 1 to 4 bits, got {bits} for {pattern!r}")
            self.code_for(bits)

    def _trellis_code(self) -> TrellisCode:
        if self.profile == "qtip":
            name = self.code or "hyb"
            L = (8 if name == "scalar" else 16) if self.L is None else self.L
            return TrellisCode(TrellisSpec(L, self.bits, 2 if name == "hyb" else 1), name)
        name = self.code or EXL3_CODES[0]
        if name not in EXL3_CODES:
            raise ValueError(f"profile 'exl3' has the codes {', '.join(EXL3_CODES)}, not {name!r}")
        if self.L not in (None, 16):
            raise ValueError(f"profile 'exl3' has L=16, got {self.L}; use profile 'qtip'")
        return exl3.exl3_code(name, self.bits)

    def code_for(self, bits: int) -> TrellisCode:
        """The code of layers with so many bits; ValueError if there is none."""
        spec = self.trellis_code.spec
        return replace(self.trellis_code, spec=TrellisSpec(spec.L, bits, spec.V))

    def windows_at_once(self, model: nn.Module, names: Sequence[str]) -> int:
        """``batch``, or what it stands for with these layers."""
        if self.batch is not None:
            return self.batch
        if self.device == "cpu":
            return 4
        widest = max(get_linear(model, name).in_features for name in names)
        return min(max(_NUMBERS_AT_ONCE // (self.ctx * widest), 1), 32)

    def bits_of(self, model: nn.Module, names: Sequence[str]) -> dict[str, int]:
        """Bits per weight of every named layer.

        Raises:
            UnknownLayerError: a pattern of ``bits_map`` that names no layer.
        """
        bits = dict.fromkeys(names, self.bits)
        for pattern, other in self.bits_map:
            bits |= dict.fromkeys(set(select_layers(model, (pattern,))) & set(names), other)
        return bits

    def names_of(self, model: nn.Module) -> list[str]:
        """The layers that are to be quantized.

        Where ``layers`` is None, those narrower than a tile stay as they are: gates of a few
        outputs, whose padding would take more bits than they have.

        Raises:
            UnknownLayerError: a pattern that names no layer.
            ValueError: no layer is left, or one is quantized already.
        """
        names = select_layers(model, self.layers)
        if self.layers is None:
            narrow = _narrow_layers(model)
            names = [name for name in names if name not in narrow]
        skipped = set(select_layers(model, self.skip)) if self.skip else set()
        names = [name for name in names if name not in skipped]
        if not names:
            raise ValueError("skip leaves no layer to quantize")
        for name in sorted(quantized_layers(model).keys() & set(names)):
            raise ValueError(f"{name} is quantized already; quantize the full-precision model")
        return names

    def layer_format(self, linear: nn.Linear, bits: int | None = None) -> LayerFormat:
        """The stored shape of a linear layer with so many bits, by default ``bits``."""
        blocked = self.profile == "exl3"
        return LayerFormat(
            in_features=linear.in_features,
            out_features=linear.out_features,
            code=self.trellis_code if bits is None else self.code_for(bits),
            multiple=exl3.BLOCK if blocked else BLOCK,
            block=exl3.BLOCK if blocked else None,
            channel_scales=blocked,
            bias=linear.bias is not None,
        )


def quantize_model(
    model: str | Path | PreTrainedModel,
    config: QuantizeConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reports: dict[str, LayerReport] | None = None,
    fine_tune: FineTuneConfig | None = None,
    progressive: ProgressiveConfig | None = None,
    end_to_end: EndToEndConfig | None = None,
    run_directory: Path | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> PreTrainedModel:
    """Quantizes the linear layers of a causal language model after training (QTIP).

    Args:
        model: a loaded model, changed in place, or what ``load_source`` takes.
        config: see ``QuantizeConfig``.
        tokenizer: needed with a loaded model, unless ``error_feedback`` is off.
        reports: filled with a report per layer, where given.
        fine_tune: also tune every block while it is quantized.
        progressive: after every decoder layer also train those behind it; needs the memory of
            two models and of an optimizer's state for one.
        end_to_end: then tune the scales and norms of the whole model; needs the memory of two.
        run_directory: where finished decoder layers are kept, for ``resume``.
        resume: go on with what lies there.
        ranks: the processes that quantize it together, each calling this with the same arguments
            (see ``join``): each runs its share of the windows, and encodes its share of every
            layer's outputs. Rank 0 alone writes into ``run_directory``, which all of them read.
            None is this process alone.

    Returns:
        The model, with ``QuantizedLinear`` in the place of the chosen layers; ``save_quantized``
        stores it.

    Raises:
        ValueError: layers that do not exist, text shorter than a window, weights with NaN or
            infinity (named by tensor), a run that was started with other settings, or several
            ranks with tuning or fewer windows than ranks.
    """
    ranks = ranks or ONE
    if ranks.size > 1 and any(x is not None for x in (fine_tune, progressive, end_to_end)):
        raise ValueError("models are tuned on one rank only; leave the tuning out")
    if ranks.size > 1 and config.output_windows:
        raise ValueError("output_windows needs one rank; leave it out")
    if config.output_windows and not config.error_feedback:
        raise ValueError("output_windows needs Hessians: error_feedback, without --no-hessian")
    if progressive is not None and not config.error_feedback:
        raise ValueError(
            "progressive quantization needs Hessians: error_feedback, without --no-hessian"
        )
    if ranks.size > config.windows:
        raise ValueError(
            f"windows must be at least one for each of {ranks.size} ranks, got {config.windows}"
        )
    if not ranks.first:
        config = replace(config, show_progress=False)
    if isinstance(model, str | Path):
        source = load_full_precision(str(model))
        model, tokenizer = source.model, source.tokenizer
    names = config.names_of(model)
    prepare_for_layers_(model, names)
    check_finite(model)
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        raise ValueError("the model's parameters must be float32; convert it with model.float()")
    model.eval()  # type: ignore[no-untyped-call]
    windows: Tensor | None = None
    if config.error_feedback or fine_tune is not None or end_to_end is not None:
        if tokenizer is None:
            raise ValueError("a loaded model needs its tokenizer: quantize_model(..., tokenizer=)")
        windows = ranks.once(partial(_calibration_windows, model, tokenizer, config))
        if len(windows) < ranks.size:
            raise ValueError(f"the text has {len(windows)} windows, too few for {ranks.size} ranks")
    settings = {
        **{name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS},
        "fine_tune": None if fine_tune is None else asdict(fine_tune),
        "progressive": None if progressive is None else asdict(progressive),
        "end_to_end": None if end_to_end is None else asdict(end_to_end),
        "model": fingerprint(model),
        "weights": digest(sampled(p) for p in model.parameters()),
        "version": __version__,
        "text": None if windows is None else digest([windows]),
    }
    if config.show_progress:
        print(estimate(model, config, fine_tune, progressive, end_to_end), file=sys.stderr)
    store = ranks.once(partial(LayerStore, run_directory, settings, resume=resume))
    if windows is not None and (fine_tune is not None or end_to_end is not None):
        held_out_windows(len(windows), 0.5)
    with_teacher = end_to_end is not None or progressive is not None
    teacher = copy.deepcopy(model) if with_teacher else None
    behind: Progressive | None = None
    if progressive is not None and teacher is not None and windows is not None:
        behind = Progressive(
            model,
            teacher,
            names,
            windows if progressive.data is None else _text_behind(tokenizer, progressive),
            progressive,
            store,
            device=torch.device(config.device),
            show_progress=config.show_progress,
        )
    outputs: dict[str, Tensor] = {}
    if windows is not None and config.output_windows:
        outputs = output_hessians(
            model,
            names,
            windows[: config.output_windows],
            device=torch.device(config.device),
            seed=config.seed,
            show_progress=config.show_progress,
        )
    quantizer = BlockQuantizer(
        model, names, windows, config, fine_tune, store, ranks, behind, outputs
    )
    quantizer.run()
    if end_to_end is not None and teacher is not None and windows is not None:
        with on_device(model, config.device), on_device(teacher, config.device):
            tune_end_to_end(
                model, teacher, windows, end_to_end, store, show_progress=config.show_progress
            )
    if reports is not None:
        reports |= {name: quantizer.reports[name] for name in quantizer.names}
    return model


def _narrow_layers(model: nn.Module) -> set[str]:
    """Names of plain linear layers with fewer inputs or outputs than a tile."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and min(module.weight.shape) < TILE_SIDE
    }


def _text_behind(tokenizer: Any, config: ProgressiveConfig) -> Tensor:
    assert config.data is not None
    documents, _ = train_and_held_out_documents(config.data, tokenizer=tokenizer)
    return token_windows(tokenizer, documents, config.ctx)


def _calibration_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: QuantizeConfig
) -> Tensor:
    if is_teacher_text(config.data):
        return sample_windows(
            model,
            tokenizer,
            config.windows,
            config.ctx,
            seed=config.seed,
            batch=SAMPLED_AT_ONCE,
            device=config.device,
            cache=cache_directory() / "teacher_text",
            show_progress=config.show_progress,
        )
    documents = stream_documents(config.data, split="calibration", tokenizer=tokenizer)
    return token_windows(tokenizer, documents, config.ctx, limit=config.windows)
