"""What transformers reads and writes packed models by.

``softtrellis.integrations.transformers`` registers it, for ``from_pretrained``; ``load_quantized``
gives it to its models, for their ``save_pretrained``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from softtrellis.io.claims import check_packed
from softtrellis.io.errors import DAMAGED
from softtrellis.io.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    CheckpointError,
    check_version,
    codes_of,
    in_order_of_codes,
    is_checkpoint,
    quantization_config,
    read_manifest,
)
from softtrellis.io.narrow import narrow_, packed_names
from softtrellis.io.tables import TABLE, codebooks_of, read_tables, stored_tables
from softtrellis.modules.experts import UnfusedExperts
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear, meta_layer
from softtrellis.modules.replace import (
    check_no_adapters,
    dequantize_,
    prepare_for_layers_,
    quantized_layers,
    replace_modules,
    share_codebooks_,
)
from softtrellis.quantizers.hard import TrellisCode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SofttrellisConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint's config.json.

    Attributes:
        quant_method: "softtrellis".
        format_version: of the checkpoint.
        codes, layers: as in the manifest, see docs/checkpoint.md. None in checkpoints written
            before they were kept here, which are loaded by the manifest beside them.

    Raises:
        CheckpointError: another version, or a key that is none of these.
    """

    def __init__(
        self,
        *,
        quant_method: str = FORMAT,
        format_version: int = FORMAT_VERSION,
        codes: Sequence[Mapping[str, Any]] | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        check_version(format_version, "config.json")
        if unknown:
            raise CheckpointError(
                f"quantization_config in config.json has an unknown key {next(iter(unknown))!r}; "
                "remove it, or copy the checkpoint again"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.codes, self.layers = codes, layers

    @property
    def formats(self) -> dict[str, LayerFormat] | None:
        """The shapes of the quantized layers, if they are here.

        Raises:
            CheckpointError: they are damaged.
        """
        if self.layers is None:
            return None
        try:
            return in_order_of_codes({"codes": self.codes, "layers": self.layers})
        except DAMAGED as error:
            raise CheckpointError(
                f"quantization_config in config.json is damaged ({type(error).__name__}: "
                f"{error}); copy the checkpoint again"
            ) from error

    def describe(self, layers: Mapping[str, LayerFormat]) -> None:
        """Takes the shapes of these layers, in the current format version."""
        self.__dict__.update(quantization_config(layers))


class SofttrellisQuantizer(HfQuantizer):
    """Lets ``from_pretrained`` and ``save_pretrained`` read and write our tensors.

    It puts ``QuantizedLinear`` layers into the empty model, to which transformers then loads the
    stored tensors by name and on the devices of the ``device_map``; codebooks follow. Checksums
    are not compared: ``load_quantized`` does that.
    """

    requires_calibration = True  # only models that are quantized already
    quantization_config: SofttrellisConfig

    def is_serializable(self) -> bool:
        """``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top; the codes stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """``generate`` may compile the forward pass, as it does on a GPU with a static cache."""
        return True

    def update_weight_conversions(
        self,
        weight_conversions: list[Any],
        model: PreTrainedModel | None = None,
    ) -> list[Any]:
        """None: our checkpoints name tensors as the model itself does."""
        return []

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        files = [Path(name) for name in checkpoint_files or ()]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise CheckpointError(
                "softtrellis checkpoints are loaded from safetensors files; give from_pretrained a "
                "directory or a hub id"
            )
        layers = self._formats(files[0].parent)
        tables, names = read_tables(files)
        with torch.device("cpu"):  # the model itself is on the meta device by default
            self._codebooks = codebooks_of(codes_of(layers), tables)
        with _plain_errors(model):
            prepare_for_layers_(model, layers)
            replace_modules(model, layers, lambda name, _: meta_layer(layers[name]))
        _check_complete(model, names)
        _check_packed(model, files)
        for module in model.modules():
            if isinstance(module, UnfusedExperts):  # nothing in the shell is to be initialised
                module.shell._is_hf_initialized = True  # type: ignore[assignment]
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {rf"^{TABLE}"}

    def _formats(self, directory: Path) -> dict[str, LayerFormat]:
        layers = self.quantization_config.formats
        if layers is None:
            if not is_checkpoint(directory):
                raise CheckpointError(
                    f"config.json does not describe the quantized layers and {MANIFEST} is not "
                    f"beside the weights in {directory}; download the whole checkpoint"
                )
            layers = dict(read_manifest(directory).layers)
            self.quantization_config.describe(layers)
        return layers

    def _process_model_after_weight_loading(
        self,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> PreTrainedModel:
        first: dict[tuple[TrellisCode, torch.device], QuantizedLinear] = {}
        for layer in quantized_layers(model).values():
            code, device = layer.layer.code, layer.codes.device
            if first.setdefault((code, device), layer) is layer:
                layer.set_codebook(self._codebooks[code].to(device))
        share_codebooks_(model)
        self._codebooks = {}
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """All tensors, narrowed where nothing is lost, and the codes' tables.

        Of a model with adapters that transformers put there, what it takes; of one whose quantized
        layers were all exchanged for dense ones, too.

        Raises:
            ValueError: a model with adapters that peft put there.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        check_no_adapters(model)
        layers = quantized_layers(model)
        if not layers:
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
            return None, {}
        self.quantization_config.describe({name: layer.layer for name, layer in layers.items()})
        model.config.quantization_config = self.quantization_config
        tensors = model.state_dict()
        narrow_(tensors, packed_names(layers))
        return tensors | stored_tables(layers), {}

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        dequantize_(model)
        model.to(dtype=dtype)  # type: ignore[call-arg]
        return model


def _check_complete(model: PreTrainedModel, names: set[str]) -> None:
    """CheckpointError for a tensor of ours, stored or described alone: transformers only warns."""
    for name, layer in quantized_layers(model).items():
        for key in layer.state_dict():
            if f"{name}.{key}" not in names:
                raise CheckpointError(f"the checkpoint lacks {name}.{key}; copy it again")
    unknown = names - model.state_dict().keys()
    for name in sorted(unknown):
        layer_name, _, key = name.rpartition(".")
        if key == "codes":
            raise CheckpointError(
                f"the checkpoint holds {name}, and its description of the quantized layers lacks "
                f"{layer_name}; copy it again"
            )


def _check_packed(model: PreTrainedModel, files: Sequence[Path]) -> None:
    """CheckpointError for a packed tensor of another dtype, or with numbers that are not finite."""
    from safetensors import safe_open

    wanted = model.state_dict()
    packed = packed_names(quantized_layers(model))
    for path in files:
        with safe_open(str(path), "pt") as file, torch.device("cpu"):
            for name in packed.intersection(file.keys()):
                check_packed(name, file.get_tensor(name), wanted[name].dtype)


@contextmanager
def _plain_errors(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except AttributeError as error:
        raise CheckpointError(
            f"the quantized layers of config.json do not fit a {type(model).__name__} ({error}); "
            "load it with AutoModelForCausalLM"
        ) from error
