"""LoRA with peft on a quantized model: the codes stay as they are, the adapters are trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softtrellis.extras import install

if importlib.util.find_spec("peft") is None:
    raise ImportError(f"LoRA needs peft; {install('lora')}")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import linear_names, quantized_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoraQuantizedLinear(nn.Module, LoraLayer):
    """A quantized layer with adapters: y = W x + b + scaling · B A dropout(x).

    The gradient of x goes through the decoded weight, which is decoded again for it. Adapters
    cannot be merged: their sum with W has no codes.
    """

    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **_: Any,
    ) -> None:
        """As peft's dispatcher calls it.

        Raises:
            ValueError: DoRA, or an initialisation that needs the weight itself.
        """
        if config.use_dora:
            raise ValueError("use_dora must be off: it needs a dense weight; dequantize_ gives one")
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                "init_lora_weights must be True, False or 'gaussian' on quantized layers, got "
                f"{config.init_lora_weights!r}"
            )
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, QuantizedLinear)
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device, torch.dtype | None]:
        assert isinstance(base_layer, QuantizedLinear)
        return base_layer.codes.device, None

    def forward(self, x: Tensor, *, adapter_names: list[str] | None = None) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of ``x``.

        ``adapter_names`` gives every row of a batch its own adapter, as in peft.
        """
        check: Any = LoraLayer._check_forward_args
        check(self, x, adapter_names=adapter_names)
        if adapter_names is not None:
            mixed: Tensor = LoraLayer._mixed_batch_forward(self, x, adapter_names=adapter_names)
            return mixed
        result: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                down, up = self.lora_A[adapter], self.lora_B[adapter]
                inputs = self.lora_dropout[adapter](x.to(next(down.parameters()).dtype))
                result = result + (self.scaling[adapter] * up(down(inputs))).to(result.dtype)
        return result

    def merge(self, *_: Any, **__: Any) -> None:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "adapters cannot be merged into codes; keep them beside the model, or call dequantize_ "
            "on the model before adding them"
        )


def register(config: LoraConfig) -> LoraConfig:
    """Tells a configuration of peft how quantized layers take adapters, and returns it.

    peft does not save this; call it again on a configuration that was read from a file.
    """
    config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
    return config


def add_lora(
    model: PreTrainedModel, config: LoraConfig, *, dtype: torch.dtype = torch.float32
) -> PeftModel:
    """Puts adapters on a quantized model, in place; only they take gradients.

    Args:
        model: from ``load_quantized`` or ``from_pretrained``.
        config: peft's; without ``target_modules`` every quantized layer gets an adapter, with
            "all-linear" every linear layer of the decoder layers, dense ones too.
        dtype: of the adapters, float32 or bfloat16, whatever the model is in. Not the model's by
            default: AdamW keeps its moments in the same dtype, and in bfloat16 the second moment
            never decays, since 0.999 v rounds to v.

    Returns:
        peft's model; ``save_pretrained`` of it writes the adapters only.

    Raises:
        ValueError: the model has no quantized layer.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("the model has no quantized layer; use peft's get_peft_model")
    if config.target_modules is None:
        config.target_modules = list(layers)
    elif config.target_modules == "all-linear":  # peft itself would look for nn.Linear only
        config.target_modules = linear_names(model)
    return _cast(get_peft_model(model, register(config), autocast_adapter_dtype=False), dtype)


def load_lora(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    trainable: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """Puts saved adapters on the quantized model that they were trained on, in place.

    Args:
        model: from ``load_quantized`` or ``from_pretrained``.
        directory: what ``save_pretrained`` of ``add_lora``'s model wrote, or its hub id.
        trainable: whether training goes on.
        dtype: of the adapters, as in ``add_lora``.

    Raises:
        ValueError: the model has no quantized layer.
    """
    if not quantized_layers(model):
        raise ValueError("the model has no quantized layer; use peft's PeftModel.from_pretrained")
    config = register(LoraConfig.from_pretrained(str(directory)))
    config.inference_mode = not trainable
    loaded = PeftModel.from_pretrained(
        model, str(directory), config=config, is_trainable=trainable, autocast_adapter_dtype=False
    )
    return _cast(loaded, dtype)


def _cast(model: PeftModel, dtype: torch.dtype) -> PeftModel:
    for module in model.modules():
        if isinstance(module, LoraQuantizedLinear):
            module.lora_A.to(dtype)
            module.lora_B.to(dtype)
    return model
