"""How long quantizing a model will take, and what it needs: measured rates times counted work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from softtrellis.modules.quantized_linear import LayerFormat
from softtrellis.modules.replace import (
    decoder_index,
    decoder_layers,
    get_linear,
    head_name,
)
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.quantizers.ldlq import BLOCK
from softtrellis.recipes.finetune import FineTuneConfig
from softtrellis.trellis.viterbi import viterbi

if TYPE_CHECKING:
    from softtrellis.recipes.end_to_end import EndToEndConfig
    from softtrellis.recipes.progressive import ProgressiveConfig
    from softtrellis.recipes.ptq import QuantizeConfig

_CPU_TILES = 8
_SIDE = 1024
_PAIRED_PASSES = 5  # both streams, up to the inputs of each group; and the original layer's output
_BEHIND = 3  # teacher, the quantized half, and forward and backward of the other one
_BACKWARD = 3  # a training step costs about three forward passes


@dataclass(frozen=True)
class Estimate:
    """What quantizing will take.

    Attributes:
        layers: linear layers.
        weights: their weights.
        tiles: tiles of 256 weights, padding included.
        bits: stored bits per weight, with scales and signs.
        encode_seconds: Viterbi.
        run_seconds: running the model on the calibration text, and the Hessians.
        tune_seconds: fine-tuning.
        device_bytes: memory on the device: the largest decoder layer, activations, Hessians,
            and what the kernels need.
        file_bytes: size of the checkpoint.
    """

    layers: int
    weights: int
    tiles: int
    bits: float
    encode_seconds: float
    run_seconds: float
    tune_seconds: float
    device_bytes: int
    file_bytes: int

    @property
    def seconds(self) -> float:
        """All together."""
        return self.encode_seconds + self.run_seconds + self.tune_seconds

    def __str__(self) -> str:
        parts = [
            f"{self.layers} linear layers, {self.weights:,} weights, {self.bits:.3f} bits per "
            "weight with scales and signs",
            f"about {_duration(self.seconds)} on this machine: encoding "
            f"{_duration(self.encode_seconds)}, running the model {_duration(self.run_seconds)}, "
            f"tuning {_duration(self.tune_seconds)}",
            f"about {self.device_bytes / 2**30:.1f} GiB on the device, "
            f"{self.file_bytes / 2**20:.0f} MiB on disk",
        ]
        return "\n".join(parts)


def estimate(
    model: nn.Module,
    config: QuantizeConfig,
    fine_tune: FineTuneConfig | None,
    progressive: ProgressiveConfig | None = None,
    end_to_end: EndToEndConfig | None = None,
) -> Estimate:
    """Times the encoder and a matmul on the device, and counts what a model needs of them.

    Args:
        model: prepared for the layers that will be quantized, see ``prepare_for_layers_``.
        config, fine_tune, progressive, end_to_end: as for ``quantize_model``.

    Raises:
        UnknownLayerError: a pattern that names no layer.
    """
    names = config.names_of(model)
    bits = config.bits_of(model, names)
    formats = {name: config.layer_format(get_linear(model, name), bits[name]) for name in names}
    whole = dict(formats)
    if config.head_bits is not None:
        head = head_name(model)
        whole[head] = config.layer_format(get_linear(model, head), config.head_bits)
    device = torch.device(config.device)
    tiles_at_once = sorted(layer.out_features for layer in formats.values())[len(names) // 2] // 16
    count = _CPU_TILES if device.type == "cpu" else max(1, tiles_at_once)
    per_tile = {
        code: _seconds_per_tile(code, count, config, device)
        for code in dict.fromkeys(layer.code for layer in whole.values())
    }
    encode = sum(layer.tiles * per_tile[layer.code] for layer in whole.values())
    with_text = config.error_feedback or fine_tune is not None or end_to_end is not None
    tokens = config.windows * config.ctx if with_text else 0
    rate = _multiply_adds_per_second(device)
    groups = {(name.rpartition(".")[0], layer.in_features) for name, layer in formats.items()}
    _, layers = decoder_layers(model)
    last = max(decoder_index(model, name) for name in names)
    passed = sum(p.numel() for layer in layers[: last + 1] for p in layer.parameters())
    passes, moments = 2, 1
    if fine_tune is not None and config.inputs != "original":
        passes += 1
    if config.inputs == "corrected" and config.error_feedback:
        passes, moments = passes + _PAIRED_PASSES, 2
    run = tokens * (passes * passed + moments * sum(size**2 for _, size in groups)) / rate
    tune = 0.0
    if fine_tune is not None:
        per_layer = len(groups) / len({decoder_index(model, name) for name in names})
        tune = tokens * passed * _BACKWARD * fine_tune.epochs * per_layer / rate
    everything = sum(p.numel() for p in model.parameters())
    if config.output_windows:  # a group's antidiagonals wait for each other
        gradients = config.output_windows * config.ctx
        widths = sum(layer.out_features**2 for layer in formats.values())
        run += gradients * (everything * _BACKWARD + widths) / rate
        alone = _seconds_per_tile(config.trellis_code, 1, config, device)
        heights = dict.fromkeys(groups, 0)
        for name, layer in formats.items():
            group = name.rpartition(".")[0], layer.in_features
            heights[group] = max(heights[group], layer.out_features)
        waves = sum((size + height) // BLOCK for (_, size), height in heights.items())
        encode = max(encode, waves * alone)
    if progressive is not None:
        ctx = config.ctx if progressive.data is None else progressive.ctx
        seen = progressive.steps * progressive.batch * ctx * last
        tune += seen * everything * _BEHIND / rate
    if end_to_end is not None:
        tune += tokens * everything * (_BACKWARD + 1) * end_to_end.epochs / rate
    weights = sum(layer.in_features * layer.out_features for layer in whole.values())
    tuned = fine_tune is not None or end_to_end is not None  # progressive leaves no scales
    stored = sum(_stored_bits(layer, tuned=tuned) for layer in whole.values())
    dense = sum(_bytes(p) for p in model.parameters())
    dense -= sum(_bytes(get_linear(model, name).weight) for name in names)
    at_once = config.windows_at_once(model, names)
    needed = _device_bytes(list(layers)[: last + 1], formats, tokens, at_once, config)
    if config.output_windows:  # the model, and activations about as large
        needed = max(needed, 8 * everything)
    if fine_tune is not None:  # gradients, two moments, the best values, the graph of a batch
        needed += 4 * max(sum(_bytes(p) for p in layer.parameters()) for layer in layers)
    if progressive is not None:  # both models, gradients, two moments
        needed += 20 * everything
    if end_to_end is not None:
        needed = max(needed, 8 * everything)
    return Estimate(
        layers=len(whole),
        weights=weights,
        tiles=sum(layer.tiles for layer in whole.values()),
        bits=stored / weights,
        encode_seconds=encode,
        run_seconds=run,
        tune_seconds=tune,
        device_bytes=needed,
        file_bytes=dense + stored // 8,
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _stored_bits(layer: LayerFormat, *, tuned: bool) -> int:
    rows, columns = layer.padded
    scales = 16 * layer.out_features if tuned or layer.channel_scales else 0
    scales += 16 * layer.in_features if tuned else 0
    return layer.tiles * 256 * layer.code.spec.k + rows + columns + 32 + scales


def _device_bytes(
    layers: Sequence[nn.Module],
    formats: dict[str, LayerFormat],
    tokens: int,
    at_once: int,
    config: QuantizeConfig,
) -> int:
    largest = max(sum(_bytes(p) for p in layer.parameters()) for layer in layers)
    widths = [layer.in_features for layer in formats.values()]
    hidden, widest = min(widths), max(widths)
    states = 3 * 4 * tokens * hidden
    batch = 8 * 4 * at_once * config.ctx * widest if tokens else 0
    hessians = 4 * 8 * widest**2 if config.error_feedback else 0
    kernels = (1 << 30) if config.device != "cpu" else (1 << 28)
    return 2 * largest + states + batch + hessians + kernels


def _seconds_per_tile(
    code: TrellisCode, count: int, config: QuantizeConfig, device: torch.device
) -> float:
    """Of a batch of so many tiles: as many as LDLQ encodes at once matter on a GPU."""
    values = code.codebook().to(device)
    w = torch.randn(count, code.spec.steps(), code.spec.V, device=device)
    return _timed(lambda: viterbi(w, values, code.spec, backend=config.backend), device) / count


def _multiply_adds_per_second(device: torch.device) -> float:
    x = torch.randn(_SIDE, _SIDE, device=device)
    return _SIDE**3 / _timed(lambda: x @ x, device)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second of two calls."""
    elapsed = 0.0
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - began
    return elapsed


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
