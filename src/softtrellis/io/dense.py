"""Writing models with dense weights, for transformers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from softtrellis.io.manifest import BaseModel
from softtrellis.io.model_card import export_card
from softtrellis.io.model_files import assign_tensors, config_of, empty_model, write_companions
from softtrellis.io.sources import quiet
from softtrellis.modules.experts import DOWN, UnfusedExperts
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.unify import is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DenseType = Literal["bfloat16", "float16", "float32"]
DENSE_TYPES: tuple[str, ...] = get_args(DenseType)


def save_dense(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    dtype: DenseType = "bfloat16",
    base: BaseModel,
    source_directory: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> int:
    """Writes a model in Hugging Face form with every weight decoded.

    Experts and ``Conv1D`` layers that were taken apart are put together again, so that the
    directory is like the base model's.

    Args:
        model: with quantized layers.
        tokenizer: saved with its chat template.
        directory: an existing, writable directory; see ``whole_directory``.
        dtype: of all floating-point tensors, which are rounded to it.
        base: the model it was made from, for the model card.
        source_directory: where licence files are copied from.
        provenance: settings and figures for the model card.

    Returns:
        Bytes of the tensors.

    Raises:
        ValueError: another dtype, or a value outside its range.
    """
    if dtype not in DENSE_TYPES:
        raise ValueError(f"dtype must be one of {', '.join(DENSE_TYPES)}, got {dtype!r}")
    dense = empty_model(config_of(model), device="meta")
    tensors = {
        name: _rounded(name, tensor, getattr(torch, dtype))
        for name, tensor in _decoded(model, dense)
    }
    if missing := assign_tensors(dense, tensors):
        raise ValueError(f"the model lacks {missing[0]}")
    dense.config.dtype = getattr(torch, dtype)
    dense.generation_config = model.generation_config
    with quiet():
        dense.save_pretrained(directory)
    write_companions(dense, tokenizer, directory, config=None, source_directory=source_directory)
    form = f"dense weights in {dtype}, for transformers"
    card = export_card(base.name, base.licence, form, provenance or {})
    (directory / "README.md").write_text(card, encoding="utf-8")
    files = list(directory.glob("*.safetensors"))
    for path in files:
        path.chmod(0o644)
    return sum(path.stat().st_size for path in files)


def _decoded(model: nn.Module, dense: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``model`` one by one, under the names and in the shapes of ``dense``."""
    wanted = dense.state_dict().keys()
    for name, tensor in model.state_dict().items():
        if name in wanted:  # neither buffers of quantized layers nor experts
            holder, _, key = name.rpartition(".")
            turned = key == "weight" and _turned(model, dense, holder)
            yield name, tensor.T if turned else tensor
    for name, module in model.named_modules():
        if isinstance(module, UnfusedExperts):
            for key, tensor in _fused(module):
                yield f"{name}.{key}", tensor
        elif isinstance(module, QuantizedLinear) and f"{name}.weight" in wanted:
            weight = module.weight()
            yield f"{name}.weight", weight.T if _turned(model, dense, name) else weight


def _turned(model: nn.Module, dense: nn.Module, name: str) -> bool:
    """Whether a ``Conv1D`` has become a linear layer in ``model``."""
    return is_conv1d(dense.get_submodule(name)) and not is_conv1d(model.get_submodule(name))


def _fused(experts: UnfusedExperts) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the module that the experts come from."""
    layout = experts.layout
    for key in (layout.first, DOWN):
        linears = [experts.get_submodule(f"{e}.{key}") for e in range(layout.count)]
        weights = torch.stack([_weight(linear) for linear in linears])
        yield key, weights.mT if layout.transposed else weights
        if layout.bias:
            yield f"{key}_bias", torch.stack([_bias(linear) for linear in linears])
    yield from experts.shell.state_dict().items()


def _weight(linear: nn.Module) -> Tensor:
    if isinstance(linear, QuantizedLinear):
        return linear.weight()
    return linear.get_parameter("weight").detach()


def _bias(linear: nn.Module) -> Tensor:
    assert isinstance(linear.bias, Tensor)
    return linear.bias.detach()


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.detach().to(dtype).contiguous()
    if not bool(rounded.isfinite().all()):
        raise ValueError(f"{name} has a value outside the range of {dtype}; use --dtype bfloat16")
    return rounded
