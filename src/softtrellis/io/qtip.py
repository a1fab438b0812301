"""Reading QTIP's checkpoints, as far as their files say what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softtrellis.codes.hybrid import TABLE_BITS, TABLE_ROWS
from softtrellis.io.foreign import (
    QTIP_SETTINGS,
    Imported,
    Plan,
    check_tensor,
    dense_tensors,
    fill_model,
    foreign_tokenizer,
    planned_model,
    signs_of,
)
from softtrellis.io.manifest import BaseModel, CheckpointError
from softtrellis.io.sources import card_licence, fingerprint
from softtrellis.io.tensor_files import TensorFiles, read_json
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TILE_SIDE, TrellisSpec
from softtrellis.transforms.incoherence import pack_signs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TENSORS = ("trellis", "SU", "SV", "tlut")
"""The names that a layer's tensors can have."""

CODES = {"1mad": "1mad", "3inst": "3inst", "quantlut_sym": "hyb"}
"""Names here by QTIP's ``decode_mode``."""


def is_qtip(directory: Path) -> bool:
    """Whether a directory's config.json is one of QTIP's.

    Raises:
        CheckpointError: a config.json that cannot be read.
    """
    path = directory / "config.json"
    return path.is_file() and QTIP_SETTINGS in read_json(path)


def load_qtip(directory: Path) -> Imported:
    """Reads a checkpoint of QTIP with the same codes.

    Codes, signs, input scales and the table of HYB are kept. Scales of output channels are
    float32 there and float16 here, beside one float32 scale of the matrix: where the channels'
    sizes differ, they are rounded, to a relative error of at most 2^-11.

    The files do not say everything. Tiles are taken to be in the order of the paper, along the
    inputs, then down the outputs, and not in that of QTIP's kernel; the Hadamard matrices of
    powers of two to be Sylvester's. If that is wrong, the weights have the right size and
    correlate with those of the full-precision model by about 0: compare them.

    Args:
        directory: with config.json, a tokenizer, and safetensors files.

    Raises:
        CheckpointError: not QTIP, damaged, a code that does not exist here, layers with a bias or
            of a size that is no power of two, or tables of HYB that differ between layers.
    """
    settings = read_json(directory / "config.json").get(QTIP_SETTINGS)
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{directory} is not a checkpoint of QTIP: its config.json has no {QTIP_SETTINGS}"
        )
    code = qtip_code(settings)
    with TensorFiles(directory) as files:
        model, plan = planned_model(directory, files, TENSORS)
        rounded = _fill(model, plan, files, code)
    tokenizer = foreign_tokenizer(directory)
    base = BaseModel(directory.resolve().name, fingerprint(model), card_licence(directory))
    return Imported(model, tokenizer, base, {"import": dict(settings)}, {}, rounded)


def qtip_code(settings: Mapping[str, Any]) -> TrellisCode:
    """The code of ``quip_params``.

    Raises:
        CheckpointError: it does not exist here.
    """
    mode = settings.get("decode_mode")
    if not isinstance(mode, str) or mode not in CODES:
        raise CheckpointError(
            f"the checkpoint of QTIP has decode_mode {mode!r}; {', '.join(CODES)} can be imported"
        )
    name = CODES[mode]
    needed = {"td_x": TILE_SIDE, "td_y": TILE_SIDE}
    if name == "hyb":
        needed["tlut_bits"] = TABLE_BITS
    for key, value in needed.items():
        if settings.get(key) != value:
            raise CheckpointError(
                f"the checkpoint of QTIP has {key} {settings.get(key)!r}; {value} can be imported"
            )
    try:
        spec = TrellisSpec(*(settings.get(key) for key in "LKV"))  # type: ignore[arg-type]
        return TrellisCode(spec, name, "first" if name == "hyb" else "second", normalize=False)
    except ValueError as error:
        raise CheckpointError(f"the trellis of the checkpoint of QTIP: {error}") from error


def _fill(
    model: PreTrainedModel, plan: Plan, files: TensorFiles, code: TrellisCode
) -> tuple[str, ...]:
    """Puts everything in place; names of the layers whose scales were rounded."""
    modules: dict[str, QuantizedLinear] = {}
    rounded: list[str] = []
    table: Tensor | None = None
    for name, (inputs, outputs) in plan.layers.items():
        for size in (inputs, outputs):
            _check_size(name, size)
        if getattr(model.get_submodule(name), "bias", None) is not None:
            raise CheckpointError(f"{name} has a bias, and how QTIP stores one is not known")
        keys = TENSORS if code.name == "hyb" else TENSORS[:-1]
        stored = {key: _stored(name, key, files) for key in keys}
        if code.name == "hyb":
            found = _table(name, stored["tlut"])
            table = found if table is None else table
            if not torch.equal(found, table):
                raise CheckpointError(
                    f"the tables of HYB differ between layers ({name} for one), and a checkpoint "
                    "here has one for each code"
                )
        if not modules:
            codebook = code.codebook(table)
        modules[name], exact = _layer(name, stored, (inputs, outputs), code, codebook)
        if not exact:
            rounded.append(name)
    fill_model(model, modules, dense_tensors(plan, files))
    return tuple(rounded)


def _check_size(name: str, size: int) -> None:
    if size < TILE_SIDE:
        raise CheckpointError(
            f"{name} has {size} channels, fewer than a tile, which is {TILE_SIDE} on each side"
        )
    odd = size // (size & -size)
    if odd != 1:
        raise CheckpointError(
            f"{name} has {size} channels, which is {size // odd} times {odd}: QTIP rotates them by "
            "a Hadamard matrix which its files do not tell; only layers whose "
            "dimensions are powers of two can be imported. Quantize the full-precision model "
            "instead"
        )


def _stored(name: str, key: str, files: TensorFiles) -> Tensor:
    if f"{name}.{key}" not in files.shapes:
        raise CheckpointError(f"the layer {name} of QTIP lacks its {key}; copy the model again")
    return files.get(f"{name}.{key}")


def _table(name: str, tlut: Tensor) -> Tensor:
    check_tensor(name, "tlut", tlut, torch.float16, (TABLE_ROWS, 2))
    return tlut.to(torch.float32)


def _layer(
    name: str,
    stored: Mapping[str, Tensor],
    size: tuple[int, int],
    code: TrellisCode,
    codebook: Tensor,
) -> tuple[QuantizedLinear, bool]:
    """A layer, and whether its scales are those of the file."""
    inputs, outputs = size
    check_tensor(name, "SU", stored["SU"], torch.float16, (inputs,))
    check_tensor(name, "SV", stored["SV"], torch.float32, (outputs,))
    scale, channels = _scales(stored["SV"])
    layer = LayerFormat(
        inputs,
        outputs,
        code,
        channel_scales=channels is not None,
        in_scales=bool((stored["SU"].abs() != 1).any()),
    )
    module = QuantizedLinear(layer, codebook)
    check_tensor(name, "trellis", stored["trellis"], torch.int16, tuple(module.codes.shape))
    module.codes = stored["trellis"]  # the same words: bits most significant first, blocks by rows
    module.in_signs = pack_signs(signs_of(stored["SU"]))
    module.out_signs = pack_signs(signs_of(stored["SV"]))
    module.scale = scale
    module.out_scale = channels
    if layer.in_scales:
        module.in_scale = stored["SU"].abs()
    if channels is None:
        return module, True
    return module, torch.equal(channels.to(torch.float32) * scale, stored["SV"].abs())


def _scales(sv: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scale of the matrix, float32, and float16 ones of the channels where they differ.

    The matrix's is then a power of two, so that sizes that float16 holds are kept exactly.
    """
    sizes = sv.abs()
    if bool((sizes == sizes[0]).all()):
        return sizes[0].clone(), None
    scale = torch.ldexp(torch.ones(()), torch.frexp(sizes.max()).exponent - 1)
    return scale, (sizes / scale).to(torch.float16)
