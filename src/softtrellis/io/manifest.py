"""The manifest of a checkpoint: what is in it, and the checksums."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from softtrellis.io.errors import DAMAGED
from softtrellis.io.files import sha256_of
from softtrellis.modules.quantized_linear import LayerFormat
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TrellisSpec

FORMAT, FORMAT_VERSION = "softtrellis", 3
READABLE_VERSIONS = (1, 2, 3)
MOST_CODES = 32
"""Codes of one checkpoint; every one takes memory for its codebook."""

MANIFEST, WEIGHTS = "softtrellis.json", "model.safetensors"
UNCHECKED = ("README.md", "generation_config.json")
"""Files that people edit, on hubs for instance; no weight and no logit depends on them."""

TUNING = ("fine_tune", "progressive", "end_to_end")
"""Steps of ``quantize`` in the provenance that move norms and biases, and the weights behind."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: damaged, from another version or for another model."""


@dataclass(frozen=True)
class BaseModel:
    """Which full-precision model a checkpoint was made from.

    Attributes:
        name: as it was loaded.
        fingerprint: see ``fingerprint``.
        licence: its licence.
    """

    name: str
    fingerprint: str
    licence: str = "unknown"


@dataclass(frozen=True)
class Manifest:
    """What ``softtrellis.json`` says.

    Attributes:
        base: the model it was made from.
        layers: the stored shape of every quantized layer.
        files: sha256 and bytes of every other file but ``UNCHECKED``.
        narrowed: names of the float32 tensors that are stored as bfloat16.
        provenance: settings and figures of the runs that made it, for people to read.
        version: of the format it was written in.
    """

    base: BaseModel
    layers: Mapping[str, LayerFormat]
    files: Mapping[str, Mapping[str, Any]]
    narrowed: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION


def codes_of(layers: Mapping[str, LayerFormat]) -> list[TrellisCode]:
    """The codes of the layers, each once, in the order in which they come up."""
    return list(dict.fromkeys(layer.code for layer in layers.values()))


def formats_json(layers: Mapping[str, LayerFormat]) -> dict[str, Any]:
    """The shapes of layers as "codes" and "layers"; ``formats_of`` reads them."""
    codes = codes_of(layers)
    return {
        "codes": [asdict(code) for code in codes],
        "layers": {
            name: {**asdict(layer), "code": codes.index(layer.code)}
            for name, layer in layers.items()
        },
    }


def formats_of(value: Mapping[str, Any], version: int = FORMAT_VERSION) -> dict[str, LayerFormat]:
    """The shapes of layers in JSON of a format version.

    Raises:
        DAMAGED: a damaged value.
    """
    if version == 1:  # one code for all layers
        codes = [_code(value["code"])]
        shapes = {name: {"code": 0, **layer} for name, layer in value["layers"].items()}
    else:
        codes, shapes = [_code(code) for code in value["codes"]], value["layers"]
    layers = {
        name: LayerFormat(**{**layer, "code": codes[layer["code"]]})
        for name, layer in shapes.items()
    }
    if not layers or min(layer.tiles for layer in layers.values()) < 1:
        raise ValueError("a layer without weights, or no layer")
    if len(codes_of(layers)) > MOST_CODES:
        raise ValueError(f"more than {MOST_CODES} codes")
    return layers


def is_plain_name(name: object) -> TypeGuard[str]:
    """Whether a file's name in someone else's list stays in the directory of the list."""
    return isinstance(name, str) and "\\" not in name and "\0" not in name and _is_last_part(name)


def _is_last_part(name: str) -> bool:
    return name not in ("", ".", "..") and Path(name).name == name


def in_order_of_codes(value: Mapping[str, Any]) -> dict[str, LayerFormat]:
    """``formats_of`` of config.json, where transformers sorts the layers by name.

    The layers come in the order of their codes, so that ``codes_of`` them counts the codes as the
    names of the tables do.
    """
    layers = sorted(value["layers"].items(), key=lambda item: int(item[1]["code"]))
    return formats_of({"codes": value["codes"], "layers": dict(layers)})


def quantization_config(layers: Mapping[str, LayerFormat]) -> dict[str, Any]:
    """What config.json says, so that other libraries can load the model without the manifest."""
    return {"quant_method": FORMAT, "format_version": FORMAT_VERSION, **formats_json(layers)}


def check_version(version: object, where: str) -> None:
    """CheckpointError if a checkpoint is of a version that this release cannot read."""
    if not isinstance(version, int) or isinstance(version, bool):
        raise CheckpointError(
            f"format_version of {where} must be a whole number, got {version!r}; copy the "
            "checkpoint again"
        )
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{where} has checkpoint version {version}, this release reads versions "
            f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}; use the release of softtrellis "
            "that wrote it"
        )


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    """What ``read_manifest`` reads."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base": asdict(manifest.base),
        **formats_json(manifest.layers),
        "narrowed": list(manifest.narrowed),
        "files": dict(manifest.files),
        "provenance": dict(manifest.provenance),
    }


def is_checkpoint(path: Path) -> bool:
    """Whether a directory holds a softtrellis checkpoint."""
    return (path / MANIFEST).is_file()


def quant_method(directory: Path) -> str | None:
    """How config.json says that a model is quantized: "exl3" for instance; None if it does not."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        method = config["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return method if isinstance(method, str) else None


def _why_not(directory: Path) -> str:
    """Why a directory without a manifest is no checkpoint, and what to do."""
    if not directory.is_dir():
        return "there is no such directory; make one with 'softtrellis quantize'"
    method = quant_method(directory)
    if method == "exl3":
        return "it is an EXL3 model; make one of it with 'softtrellis import'"
    if method == FORMAT:
        return (
            f"it has no {MANIFEST}, which save_pretrained does not write; copy the whole "
            "checkpoint, write the model with save_quantized, or make one with 'softtrellis "
            "quantize'"
        )
    return f"it has no {MANIFEST}; make one with 'softtrellis quantize'"


def read_manifest(directory: Path) -> Manifest:
    """Reads and validates ``softtrellis.json``.

    Raises:
        CheckpointError: not a checkpoint, damaged, or from a version this one cannot read.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a softtrellis checkpoint: {_why_not(directory)}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise CheckpointError(
                f"{path} is of format {value['format']!r}; give a checkpoint of {FORMAT!r}"
            )
        version = value["format_version"]
        check_version(version, str(directory))
        layers = formats_of(value, version)
        files = {
            name: {"sha256": str(file["sha256"]), "bytes": int(file["bytes"])}
            for name, file in value["files"].items()
            if name not in UNCHECKED  # which earlier releases listed
        }
        if not files.keys() >= {WEIGHTS, "config.json"}:
            raise ValueError("files that it must list are missing")
        if elsewhere := [name for name in files if not is_plain_name(name)]:
            raise ValueError(f"it names {elsewhere[0]!r}, which is no file beside it")
        narrowed = value["narrowed"] if version > 2 else []
        if not isinstance(narrowed, list) or not all(isinstance(name, str) for name in narrowed):
            raise ValueError("narrowed is no list of names")
        base = BaseModel(**value["base"])
        return Manifest(base, layers, files, narrowed, dict(value["provenance"]), version)
    except CheckpointError:
        raise
    except (*DAMAGED, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged ({reason}); copy the checkpoint again") from error


_WRITTEN_OVER = "(save_pretrained over a checkpoint does that, too); copy the checkpoint again"


def _code(value: Mapping[str, Any]) -> TrellisCode:
    code = dict(value)
    return TrellisCode(TrellisSpec(**code.pop("spec")), **code)


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Compares every file but ``UNCHECKED`` with its checksum.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
    """
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing {_WRITTEN_OVER}")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{path} has {size} bytes instead of {expected['bytes']}: it is truncated or "
                f"altered {_WRITTEN_OVER}"
            )
        if sha256_of(path) != expected["sha256"]:
            raise CheckpointError(
                f"{path} does not match its checksum: it was altered {_WRITTEN_OVER}"
            )
