"""Post-training quantization: Hessians, incoherence, LDLQ and tail-biting Viterbi (QTIP)."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from softtrellis.backend import Backend
from softtrellis.io.checkpoint import load_full_precision
from softtrellis.io.progress import progress
from softtrellis.io.text import load_documents, token_windows
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.modules.replace import (
    get_linear,
    prepare_for_layers_,
    quantized_layers,
    replace_modules,
    select_layers,
)
from softtrellis.quantizers.basis import WeightBasis
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.quantizers.ldlq import BLOCK, block_ldl, ldlq, proxy_loss
from softtrellis.recipes.calibration import check_finite, collect_hessians
from softtrellis.spec import TrellisSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Profile = Literal["qtip", "exl3"]
EXL3_BLOCK = 128
EXL3_CODES = ("mul1", "mcg", "3inst")


@dataclass(frozen=True)
class QuantizeConfig:
    """How a model is quantized.

    Attributes:
        profile: "qtip" (HYB, V=2, full-width Hadamard) or "exl3" (mul1, V=1, Hadamard blocks of
            128, a float16 scale per output channel, EXL3's tile order).
        bits: bits per weight, 1 to 4.
        code: see ``codebook``; None is the profile's own.
        L: bits of a trellis state.
        layers: which linear layers, see ``select_layers``; None is all of the decoder layers'.
        data: texts for the Hessians, see ``load_documents``.
        ctx: tokens per calibration window.
        windows: calibration windows.
        damping: added to each Hessian's diagonal, as a share of its mean.
        error_feedback: LDLQ; False is plain Viterbi without Hessians.
        seed: of the random signs.
        backend: of Viterbi.
        show_progress: show progress bars.
    """

    profile: Profile = "qtip"
    bits: int = 2
    code: str | None = None
    L: int = 16
    layers: tuple[str, ...] | None = None
    data: tuple[str, ...] = ("pydoc",)
    ctx: int = 512
    windows: int = 32
    damping: float = 0.01
    error_feedback: bool = True
    seed: int = 0
    backend: Backend = "auto"
    show_progress: bool = False
    trellis_code: TrellisCode = field(init=False)

    def __post_init__(self) -> None:
        if self.profile not in get_args(Profile):
            raise ValueError(f"unknown profile {self.profile!r}; use 'qtip' or 'exl3'")
        for name, least in (("ctx", 2), ("windows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping must be a positive number, got {self.damping}")
        object.__setattr__(self, "trellis_code", self._trellis_code())

    def _trellis_code(self) -> TrellisCode:
        if self.profile == "qtip":
            name = self.code or "hyb"
            return TrellisCode(TrellisSpec(self.L, self.bits, 2 if name == "hyb" else 1), name)
        name = self.code or EXL3_CODES[0]
        if name not in EXL3_CODES:
            raise ValueError(f"profile 'exl3' has the codes {', '.join(EXL3_CODES)}, not {name!r}")
        if self.L != 16:
            raise ValueError(f"profile 'exl3' has L=16, got {self.L}; use profile 'qtip'")
        spec = TrellisSpec(16, self.bits, 1)
        return TrellisCode(spec, name, normalize=False, order="exl3")

    def layer_format(self, linear: nn.Linear) -> LayerFormat:
        """The stored shape of a linear layer."""
        exl3 = self.profile == "exl3"
        return LayerFormat(
            in_features=linear.in_features,
            out_features=linear.out_features,
            code=self.trellis_code,
            multiple=EXL3_BLOCK if exl3 else BLOCK,
            block=EXL3_BLOCK if exl3 else None,
            channel_scales=exl3,
            bias=linear.bias is not None,
        )


@dataclass(frozen=True)
class LayerReport:
    """What quantization did to one layer.

    Attributes:
        proxy_loss: share of the output's energy lost on the calibration text, tr(E H E^T) over
            tr(W H W^T).
        error: mean squared error of the weights over their variance.
        seconds: time it took.
    """

    proxy_loss: float
    error: float
    seconds: float


def quantize_linear(
    weight: Tensor,
    hessian: Tensor | None,
    layer: LayerFormat,
    codebook: Tensor,
    *,
    bias: Tensor | None = None,
    damping: float = 0.01,
    seed: int = 0,
    backend: Backend = "auto",
) -> tuple[QuantizedLinear, LayerReport]:
    """Quantizes one weight matrix (QTIP, section 4).

    Args:
        weight: [out, in].
        hessian: [in, in], E[x x^T]; None is plain Viterbi without error feedback.
        layer: its stored shape.
        codebook: float32 [S, V].
        bias: [out] or None.
        damping, seed, backend: see ``QuantizeConfig``.

    Raises:
        ValueError: weights with NaN or infinity, or a weight that is zero.
    """
    began = time.perf_counter()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity")
    weight = weight.detach().to(torch.float32)
    rms = float(codebook.double().square().mean().sqrt())
    basis = WeightBasis.fit(
        weight,
        layer.random_incoherence(seed).to(weight.device),
        codebook_rms=rms,
        channel_scales=layer.channel_scales,
    )
    latent, code = basis.to_latent(weight), layer.code
    if hessian is None:
        states = code.encode(latent, codebook, backend=backend)
    else:
        blocks: list[Tensor] = []

        def encode(columns: Tensor) -> Tensor:
            blocks.append(code.encode(columns, codebook, backend=backend))
            return code.decode(blocks[-1], codebook, columns.shape[0], BLOCK)

        ldlq(latent, block_ldl(basis.rotate_hessian(hessian), damping), encode)
        states = torch.stack(blocks[::-1], dim=1).flatten(0, 1)
    module = QuantizedLinear.from_states(layer, codebook, states, basis, bias)
    found = module.weight()
    identity = torch.eye(weight.shape[1], device=weight.device)
    report = LayerReport(
        proxy_loss=proxy_loss(weight, found, identity if hessian is None else hessian),
        error=float((found - weight).square().mean() / weight.square().mean()),
        seconds=time.perf_counter() - began,
    )
    return module, report


def quantize_model(
    model: str | Path | PreTrainedModel,
    config: QuantizeConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reports: dict[str, LayerReport] | None = None,
) -> PreTrainedModel:
    """Quantizes the linear layers of a causal language model after training (QTIP).

    Args:
        model: a loaded model, changed in place, or what ``load_source`` takes.
        config: see ``QuantizeConfig``.
        tokenizer: needed with a loaded model, unless ``error_feedback`` is off.
        reports: filled with a report per layer, where given.

    Returns:
        The model, with ``QuantizedLinear`` in the place of the chosen layers; ``save_quantized``
        stores it.

    Raises:
        ValueError: layers that do not exist, text shorter than a window, or weights with NaN or
            infinity (named by tensor).
    """
    if isinstance(model, str | Path):
        source = load_full_precision(str(model))
        model, tokenizer = source.model, source.tokenizer
    names = select_layers(model, config.layers)
    for name in names:
        if name in quantized_layers(model):
            raise ValueError(f"{name} is quantized already; quantize the full-precision model")
    prepare_for_layers_(model, names)
    check_finite(model)
    hessians: dict[str, Tensor] = {}
    if config.error_feedback:
        if tokenizer is None:
            raise ValueError("a loaded model needs its tokenizer: quantize_model(..., tokenizer=)")
        documents = load_documents(config.data, split="calibration")
        windows = token_windows(tokenizer, documents, config.ctx, limit=config.windows)
        hessians = collect_hessians(model, names, windows, show_progress=config.show_progress)
    codebook = config.trellis_code.codebook().to(next(model.parameters()).device)
    made: dict[str, nn.Module] = {}
    for name in progress(names, "quantize", enabled=config.show_progress):
        linear = get_linear(model, name)
        try:
            made[name], report = quantize_linear(
                linear.weight,
                hessians.pop(name, None),
                config.layer_format(linear),
                codebook,
                bias=linear.bias,
                damping=config.damping,
                seed=layer_seed(config.seed, name),
                backend=config.backend,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if reports is not None:
            reports[name] = report
    replace_modules(model, names, lambda name, _: made[name])
    return model


def layer_seed(seed: int, name: str) -> int:
    """The seed of a layer's signs: the same whichever other layers are quantized."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
