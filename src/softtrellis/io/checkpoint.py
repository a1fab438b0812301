"""Checkpoints: safetensors and JSON, versioned and checked, without pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softtrellis.io.claims import check_buffers, check_dtype, check_layer_count, check_packed
from softtrellis.io.errors import first_line
from softtrellis.io.files import sha256_of, write_json
from softtrellis.io.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    UNCHECKED,
    WEIGHTS,
    BaseModel,
    CheckpointError,
    Manifest,
    codes_of,
    is_checkpoint,
    manifest_json,
    quant_method,
    quantization_config,
    read_manifest,
    verify_files,
)
from softtrellis.io.model_card import model_card
from softtrellis.io.model_files import (
    assign_tensors,
    config_of,
    empty_model,
    freeze_,
    stored_tensors,
    write_companions,
)
from softtrellis.io.narrow import narrow_, packed_names, widened
from softtrellis.io.sources import Source, fingerprint, load_source, quiet, tokenizer_expected
from softtrellis.io.tables import TABLE, codebooks_of, stored_tables
from softtrellis.io.tensor_files import TensorFiles, read_json
from softtrellis.modules.quantized_linear import QuantizedLinear, meta_layer
from softtrellis.modules.replace import (
    cast_,
    check_no_adapters,
    prepare_for_layers_,
    quantized_layers,
    replace_modules,
    share_codebooks_,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "WEIGHTS",
    "BaseModel",
    "CheckpointError",
    "LoadConfig",
    "Manifest",
    "SizeReport",
    "base_of",
    "check_base",
    "is_checkpoint",
    "load_any",
    "load_full_precision",
    "load_quantized",
    "load_tokenizer",
    "read_manifest",
    "save_quantized",
    "size_report",
    "verify_files",
]

_OF_RUNS = ("train_", "quantize_", "log")


@dataclass(frozen=True)
class SizeReport:
    """Sizes counted from the bytes.

    Attributes:
        weights: weights of the quantized layers, without padding.
        code_bits: bits of packed codes per such weight; more than k only by padding.
        stored_bits: bits of codes, scales, signs and the code's table per such weight.
        file_bytes: size of all files of the checkpoint; a log or a report beside them not counted.
    """

    weights: int
    code_bits: float
    stored_bits: float
    file_bytes: int


def save_quantized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    base: BaseModel,
    source_directory: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Manifest:
    """Writes a quantized model; see docs/checkpoint.md for the format.

    Args:
        model: with ``QuantizedLinear`` layers. config.json gets its configuration's dtype, that of
            the base model as it was stored; or that of its parameters, if they are not float32.
        tokenizer: saved with its chat template.
        directory: an existing, writable directory; see ``whole_directory``.
        base: the model it was made from.
        source_directory: where licence files of the base model are copied from.
        provenance: settings and figures to keep.

    Raises:
        ValueError: no quantized layer, layers of one code with different tables, or adapters.
    """
    from safetensors.torch import save_file

    layers = quantized_layers(model)
    if not layers:
        raise ValueError("the model has no quantized layer to save")
    check_no_adapters(model)
    formats = {name: layer.layer for name, layer in layers.items()}
    tensors = stored_tensors(model)
    narrowed = narrow_(tensors, packed_names(layers))
    save_file(tensors | stored_tables(layers), str(directory / WEIGHTS), metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)
    config = config_of(model)
    config["quantization_config"] = quantization_config(formats)
    if config.get("dtype") is None or model.dtype != torch.float32:
        config["dtype"] = str(model.dtype).removeprefix("torch.")
    write_companions(model, tokenizer, directory, config=config, source_directory=source_directory)
    card = model_card(base.name, base.licence, formats, provenance or {})
    (directory / "README.md").write_text(card, encoding="utf-8")
    listed = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name not in (MANIFEST, *UNCHECKED)
        if not path.name.startswith(_OF_RUNS)
    ]
    files = {
        path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in listed
    }
    manifest = Manifest(base, formats, files, narrowed, provenance or {})
    write_json(directory / MANIFEST, manifest_json(manifest))
    return manifest


@dataclass(frozen=True)
class LoadConfig:
    """How ``load_quantized`` loads.

    Attributes:
        device: where the model goes.
        verify: compare the files with their checksums first, see ``verify_files``.
        dtype: of activations and of all that is not packed, bfloat16 on a GPU for the fused
            kernels; None leaves all tensors in the dtypes they were saved from, which softtrellis
            makes float32.
    """

    device: str = "cpu"
    verify: bool = True
    dtype: torch.dtype | None = None


def load_quantized(path: str | Path, config: LoadConfig | None = None) -> PreTrainedModel:
    """Loads a checkpoint that ``save_quantized`` wrote.

    Args:
        path: the checkpoint's directory.
        config: see ``LoadConfig``.

    Returns:
        A transformers model in eval mode, with ``QuantizedLinear`` layers whose weights are
        bitwise those that were saved. Its ``save_pretrained`` and ``dequantize`` work as those of
        a model of ``from_pretrained``.

    Raises:
        CheckpointError: not a checkpoint, damaged, altered, or from another version.
    """
    from softtrellis.io.hf_quantizer import SofttrellisConfig, SofttrellisQuantizer

    config = config or LoadConfig()
    directory = Path(path)
    manifest = read_manifest(directory)
    if config.verify:
        verify_files(directory, manifest)
    settings, layers = read_json(directory / "config.json"), manifest.layers
    with TensorFiles(directory, index=False) as files:
        tensors = {name: files.get(name) for name in files.shapes}
    _check_claims(settings, manifest, directory, tensors)
    tables = {name: tensors.pop(name) for name in list(tensors) if name.startswith(TABLE)}
    tensors = widened(tensors, manifest.narrowed)
    codebooks = codebooks_of(codes_of(layers), tables)
    with _fitting(directory):
        model = empty_model(settings)
        prepare_for_layers_(model, layers)
        replace_modules(
            model,
            layers,
            lambda name, _: QuantizedLinear(layers[name], codebooks[layers[name].code]),
        )
        missing = assign_tensors(model, tensors)
    if missing:
        raise CheckpointError(
            f"{directory / WEIGHTS} lacks {missing[0]}; copy the checkpoint again"
        )
    freeze_(model)
    if config.dtype is not None:
        cast_(model, config.dtype)
    model.to(torch.device(config.device))  # type: ignore[arg-type]
    share_codebooks_(model)
    model.hf_quantizer = SofttrellisQuantizer(SofttrellisConfig())  # type: ignore[assignment]
    return model


def _check_claims(
    settings: Mapping[str, Any],
    manifest: Manifest,
    directory: Path,
    tensors: Mapping[str, Tensor],
) -> None:
    """CheckpointError if the tensors are not those of the model that the JSON files describe.

    It is built on the device "meta", so that nothing takes more memory than the files' tensors.
    """
    check_layer_count(settings, len(tensors))
    with _fitting(directory), torch.device("meta"):
        skeleton = empty_model(settings, device="meta")
        prepare_for_layers_(skeleton, manifest.layers)
        modules = dict(skeleton.named_modules())
        for name, layer in manifest.layers.items():
            linear = modules.get(name)
            if not isinstance(linear, nn.Linear):
                raise AttributeError(f"{name} is no linear layer")
            if (linear.in_features, linear.out_features) != (layer.in_features, layer.out_features):
                raise AttributeError(f"{name} has another shape in config.json")
        replace_modules(
            skeleton, manifest.layers, lambda name, _: meta_layer(manifest.layers[name])
        )
        wanted, packed = skeleton.state_dict(), packed_names(quantized_layers(skeleton))
        for key, tensor in wanted.items():
            found = tensors.get(key, tensor)
            if found.shape != tensor.shape:
                raise AttributeError(
                    f"{key} is {list(found.shape)} and must be {list(tensor.shape)}"
                )
            if key in packed and key in tensors:
                check_packed(key, found, tensor.dtype)
            else:
                check_dtype(key, found.dtype, tensor.dtype)
        check_buffers(skeleton)
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
    if missing := sorted(wanted.keys() - tensors.keys() - tied):
        raise CheckpointError(
            f"{directory / WEIGHTS} lacks {missing[0]}; copy the checkpoint again"
        )


@contextmanager
def _fitting(directory: Path) -> Iterator[None]:
    """What does not fit together in a checkpoint's files becomes a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what transformers makes of a strange configuration
        raise CheckpointError(
            f"{directory / MANIFEST} does not fit the tensors beside it ({first_line(error)}); "
            "copy the checkpoint again"
        ) from error


def load_any(name: str, *, device: str = "cpu") -> Source:
    """Loads a checkpoint of ours, or else a full-precision model by ``load_source``.

    What ``save_pretrained`` wrote of a checkpoint is loaded after ``import
    softtrellis.integrations.transformers``.

    Raises:
        CheckpointError: a damaged checkpoint, one without its manifest, or an EXL3 model.
    """
    path = Path(name)
    if not is_checkpoint(path):
        if _needs_manifest(path):
            read_manifest(path)
        return load_source(name, device=device)
    model = load_quantized(path, LoadConfig(device=device))
    return Source(name, model, load_tokenizer(path), path, read_manifest(path).base.licence)


def load_full_precision(name: str) -> Source:
    """``load_source``, with a CheckpointError for one of our checkpoints or an EXL3 model."""
    path = Path(name)
    if is_checkpoint(path):
        base = read_manifest(path).base.name
        raise CheckpointError(
            f"{name} is a softtrellis checkpoint; give the full-precision model that it was made "
            f"from ({base})"
        )
    if (method := quant_method(path)) in (FORMAT, "exl3"):
        raise CheckpointError(
            f"{name} is quantized (quant_method {method!r}); give the full-precision model that it "
            "was made from"
        )
    return load_source(name)


def _needs_manifest(path: Path) -> bool:
    """Whether transformers would take a quantized model for a dense one with random weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = quant_method(path)
    return method in (FORMAT, "exl3") and method not in AUTO_QUANTIZATION_CONFIG_MAPPING


def base_of(source: Source) -> BaseModel:
    """The record of a full-precision model that a checkpoint keeps."""
    local = Path(source.name)
    name = local.resolve().name if local.exists() else source.name
    return BaseModel(name, fingerprint(source.model), source.licence)


def check_base(manifest: Manifest, model: PreTrainedModel) -> None:
    """CheckpointError unless ``model`` is the one that the checkpoint was made from."""
    if fingerprint(model) != manifest.base.fingerprint:
        raise CheckpointError(
            f"the checkpoint was made from {manifest.base.name}, and the teacher is another "
            "model; give the one it was made from"
        )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a checkpoint carries; CheckpointError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        with quiet(), tokenizer_expected(Path(path)):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, trust_remote_code=False
            )
    except Exception as error:  # the readers of damaged files raise errors of every kind
        raise CheckpointError(
            f"the tokenizer in {path} cannot be loaded: {first_line(error)}"
        ) from error
    return tokenizer


def size_report(directory: Path) -> SizeReport:
    """Counts bits per weight from the bytes of the stored tensors."""
    from safetensors import safe_open

    manifest = read_manifest(directory)
    weights = sum(layer.in_features * layer.out_features for layer in manifest.layers.values())
    codes = other = 0
    with safe_open(str(directory / WEIGHTS), "pt") as file:
        stored = set(file.keys())
        for name in manifest.layers:
            for key in ("codes", "scale", "in_signs", "out_signs", "out_scale", "in_scale"):
                full = f"{name}.{key}"
                if full not in stored:
                    continue
                tensor = file.get_tensor(full)
                bits = tensor.numel() * tensor.element_size() * 8
                codes, other = (codes + bits, other) if key == "codes" else (codes, other + bits)
        for key in (key for key in stored if key.startswith(TABLE)):
            table = file.get_tensor(key)
            other += table.numel() * table.element_size() * 8
    unlisted = [MANIFEST, *(name for name in UNCHECKED if (directory / name).is_file())]
    files = sum((directory / name).stat().st_size for name in (*unlisted, *manifest.files))
    return SizeReport(weights, codes / weights, (codes + other) / weights, files)


def describe_sizes(directory: Path) -> str:
    """Bits per weight and bytes of a checkpoint, in a line."""
    size = size_report(directory)
    return (
        f"sizes        {size.weights:,} weights: codes {size.code_bits:.4f} bits per weight, "
        f"with scales and signs {size.stored_bits:.4f}; all files {size.file_bytes:,} bytes"
    )
