"""Checkpoints in QTIP's form, of random tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from softtrellis.io.checkpoint import WEIGHTS
from softtrellis.modules.replace import get_linear, linear_names

SHAPES = {"1mad": (16, 2, 1), "3inst": (16, 3, 1), "quantlut_sym": (16, 2, 2)}


def settings_of(mode: str, L: int, K: int, V: int) -> dict[str, Any]:
    settings = {"codebook": "bitshift", "decode_mode": mode, "L": L, "K": K, "V": V}
    return settings | {"tlut_bits": 9, "td_x": 16, "td_y": 16}


def write(
    directory: Path,
    tokenizer: Any,
    mode: str = "quantlut_sym",
    shape: tuple[int, int, int] | None = None,
    *,
    uniform: bool = False,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """A model of random tiles; all sides of its layers are powers of two, without changes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    L, K, V = shape or SHAPES[mode]
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**(config | changes), tie_word_embeddings=True))
    names = linear_names(model)
    tensors = {
        name: tensor.half()
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in names and name != "lm_head.weight"
    }
    table = (torch.randn(512, 2) * 0.96825).half()
    for name in names:
        linear = get_linear(model, name)
        ins, outs = linear.in_features, linear.out_features
        trellis = torch.randint(-(2**15), 2**15, (outs // 16 * (ins // 16), 16 * K))
        tensors[f"{name}.trellis"] = trellis.to(torch.int16)
        signs = 1.0 - 2.0 * torch.randint(2, (ins + outs,))
        su, sv = signs[:ins], signs[ins:] * 0.021
        if not uniform:
            su, sv = su * (0.5 + torch.rand(ins)), sv * (0.5 + torch.rand(outs))
        tensors[f"{name}.SU"], tensors[f"{name}.SV"] = su.half(), sv
        if mode == "quantlut_sym":
            tensors[f"{name}.tlut"] = table.clone()
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    written = model.config.to_dict() | {"quip_params": settings_of(mode, L, K, V)}
    (directory / "config.json").write_text(json.dumps(written), "utf-8")
    tokenizer.save_pretrained(directory)
    return tensors
