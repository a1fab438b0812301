"""Experimental: checkpoints in vLLM, with layers that are decoded once, when they are loaded.

vLLM finds ``register`` by the entry point ``vllm.general_plugins``. Written against vLLM's
documented interfaces; it has not run inside vLLM yet. Served models take the memory of dense ones.
Not supported: tensor parallelism, quantized experts, a quantized output layer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if importlib.util.find_spec("vllm") is None:
    raise ImportError("this module is a plugin of vLLM; install vLLM to use it")

from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from softtrellis.io.manifest import FORMAT, CheckpointError, codes_of, in_order_of_codes
from softtrellis.io.tables import codebooks_of, read_tables
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear

_SHARDS = {"q": 0, "k": 1, "v": 2}


class SofttrellisVllmConfig(QuantizationConfig):  # type: ignore[misc, unused-ignore]
    """``quantization_config`` of a checkpoint's config.json, for vLLM.

    Attributes:
        layers: the shapes of the quantized layers.
        codebooks: float32 [S, V] by code, once ``maybe_update_config`` has read the tables.
    """

    # A top-level "softtrellis" is the start of the tables' names: no module of the model.
    _ignore_unexpected_suffixes = (
        *getattr(QuantizationConfig, "_ignore_unexpected_suffixes", ()),
        FORMAT,
    )

    def __init__(self, layers: Mapping[str, LayerFormat]) -> None:
        super().__init__()
        self.layers = layers
        self.codebooks: dict[Any, Tensor] = {}

    def get_name(self) -> str:
        """ "softtrellis"."""
        return FORMAT

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Any: weights are decoded to the dtype of the model."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Volta: there is no kernel of our own in the way."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SofttrellisVllmConfig:
        """From JSON.

        Raises:
            CheckpointError: a checkpoint whose config.json does not describe its layers.
        """
        if config.get("layers") is None:
            raise CheckpointError(
                "config.json does not describe the quantized layers; load the checkpoint with "
                "load_quantized and save it again"
            )
        return cls(in_order_of_codes(config))

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        """Reads the codes' tables, which belong to no layer.

        Raises:
            CheckpointError: ``model_name`` is no local directory.
        """
        files = sorted(Path(model_name).glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{model_name} has no safetensors files; download the checkpoint and give vLLM its "
                "directory"
            )
        self.codebooks = codebooks_of(codes_of(self.layers), read_tables(files)[0])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Ours for quantized linear layers, vLLM's own for the others.

        Raises:
            ValueError: what this plugin cannot load.
        """
        if not isinstance(layer, LinearBase):
            if any(name == prefix or name.startswith(f"{prefix}.") for name in self.layers):
                raise ValueError(
                    f"{prefix} is quantized, and the plugin loads linear layers only; quantize "
                    "without --head-bits and without experts"
                )
            return None
        names = self._parts(prefix)
        found = [name for name in names if name in self.layers]
        if not found:
            return UnquantizedLinearMethod()
        if found != names:
            raise ValueError(f"{prefix} is quantized in part ({', '.join(found)}); quantize all")
        return SofttrellisLinearMethod(self, [self.layers[name] for name in names])

    def _parts(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the layers that vLLM has as one: q, k and v for instance."""
        parent, dot, name = prefix.rpartition(".")
        return [parent + dot + part for part in self.packed_modules_mapping.get(name, [name])]


class SofttrellisLinearMethod(LinearMethodBase):  # type: ignore[misc, unused-ignore]
    """Loads the packed tensors of one or several stacked layers and decodes them."""

    def __init__(self, config: SofttrellisVllmConfig, formats: list[LayerFormat]) -> None:
        self.config, self.formats = config, formats

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Puts a parameter for each kind of stored tensor on the layer; loading fills the parts.

        Raises:
            ValueError: tensor parallelism, which the rotation of whole channels does not allow.
        """
        if (input_size_per_partition, sum(output_partition_sizes)) != (input_size, output_size):
            raise ValueError("softtrellis layers cannot be split; use --tensor-parallel-size 1")
        parts = [QuantizedLinear(each, self.config.codebooks[each.code]) for each in self.formats]
        layer.softtrellis_parts = nn.ModuleList(parts)
        layer.softtrellis_dtype = params_dtype  # type: ignore[assignment]
        keys = {key for part in parts for key in part.state_dict() if key != "bias"}
        for key in sorted(keys):
            placeholder = nn.Parameter(torch.empty(0), requires_grad=False)
            placeholder.weight_loader = _loader(parts, key)  # type: ignore[attr-defined]
            layer.register_parameter(key, placeholder)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Decodes the parts into ``layer.weight`` [out, in] and drops them."""
        parts: Any = layer.softtrellis_parts
        dtype: Any = layer.softtrellis_dtype
        weight = torch.cat([part.weight().to(dtype) for part in parts])
        for key in [key for key, _ in layer.named_parameters(recurse=False) if key != "bias"]:
            delattr(layer, key)
        del layer.softtrellis_parts
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] to [..., out]."""
        return functional.linear(x, layer.get_parameter("weight"), bias)


def _loader(parts: list[QuantizedLinear], key: str) -> Any:
    def load(_: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
        index = 0 if shard is None else _SHARDS[shard] if isinstance(shard, str) else shard
        parts[index].get_buffer(key).copy_(tensor)

    return load


def register() -> None:
    """Registers the quantization method; may be called more than once."""
    if FORMAT not in QUANTIZATION_METHODS:
        register_quantization_config(FORMAT)(SofttrellisVllmConfig)
