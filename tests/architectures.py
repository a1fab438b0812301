"""Tiny random models of many families, each built from its transformers configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LLAMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48}
MPT = {"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
NEO = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}
HEAD = {"head_dim": 8}

# Family: how its configuration is made tiny, where its decoder layers are, and the names of the
# linear layers in the first of them.
ATTENTION = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
GPT2_LINEARS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
FUSED_QKV = ["query_key_value", "dense"]
MLP_4H = ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]

DENSE: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "llama": (LLAMA, "model.layers", ATTENTION + MLP),
    "mistral": (LLAMA, "model.layers", ATTENTION + MLP),
    "qwen2": (LLAMA, "model.layers", ATTENTION + MLP),
    "qwen3": (LLAMA | HEAD, "model.layers", ATTENTION + MLP),
    "gemma": (LLAMA | HEAD, "model.layers", ATTENTION + MLP),
    "gemma2": (LLAMA | HEAD, "model.layers", ATTENTION + MLP),
    "gemma3_text": (LLAMA | HEAD, "model.layers", ATTENTION + MLP),
    "olmo2": (LLAMA, "model.layers", ATTENTION + MLP),
    "granite": (LLAMA, "model.layers", ATTENTION + MLP),
    "cohere": (LLAMA, "model.layers", ATTENTION + MLP),
    "stablelm": (LLAMA, "model.layers", ATTENTION + MLP),
    "smollm3": (LLAMA, "model.layers", ATTENTION + MLP),
    "glm4": (
        LLAMA | HEAD,
        "model.layers",
        [*ATTENTION, "mlp.gate_up_proj", "mlp.down_proj"],
    ),
    "phi3": (
        LLAMA,
        "model.layers",
        ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    ),
    "phi": (
        LLAMA,
        "model.layers",
        [*ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2"],
    ),
    "starcoder2": (LLAMA, "model.layers", [*ATTENTION, "mlp.c_fc", "mlp.c_proj"]),
    "gpt_neox": (
        LLAMA,
        "gpt_neox.layers",
        [*(f"attention.{name}" for name in FUSED_QKV), *MLP_4H],
    ),
    "falcon": (
        LLAMA,
        "transformer.h",
        [*(f"self_attention.{name}" for name in FUSED_QKV), *MLP_4H],
    ),
    "bloom": (
        GPT2 | {"hidden_size": 32},
        "transformer.h",
        [*(f"self_attention.{name}" for name in FUSED_QKV), *MLP_4H],
    ),
    "mpt": (
        MPT,
        "transformer.blocks",
        ["attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"],
    ),
    "opt": (
        LLAMA | OPT,
        "model.decoder.layers",
        [*(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")), "fc1", "fc2"],
    ),
    "gptj": (
        GPT2 | {"rotary_dim": 4},
        "transformer.h",
        [*(f"attn.{name}_proj" for name in ("k", "v", "q", "out")), "mlp.fc_in", "mlp.fc_out"],
    ),
    "gpt_neo": (
        LLAMA | NEO,
        "transformer.h",
        [
            *(f"attn.attention.{name}_proj" for name in ("k", "v", "q", "out")),
            "mlp.c_fc",
            "mlp.c_proj",
        ],
    ),
    "gpt_bigcode": (GPT2, "transformer.h", GPT2_LINEARS),
    "gpt2": (GPT2, "transformer.h", GPT2_LINEARS),
    "openai-gpt": (GPT2, "transformer.h", GPT2_LINEARS),
}
MOE: dict[str, dict[str, Any]] = {
    "olmoe": LLAMA | EXPERTS,
    "qwen2_moe": LLAMA | EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": LLAMA | EXPERTS | HEAD,
    "mixtral": LLAMA | {"num_local_experts": 4},
    "phimoe": LLAMA | {"num_local_experts": 4},
    "gpt_oss": LLAMA | HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": LLAMA
    | {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "nemotron_h": LLAMA
    | HEAD
    | {
        "layers_block_type": ["attention", "moe"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
    },
}


def tiny_model(family: str) -> PreTrainedModel:
    """A random model of ``DENSE`` or ``MOE``, always the same, with biases that are not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = MOE[family] if family in MOE else DENSE[family][0]
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        return model


def tokens(count: int = 24) -> torch.Tensor:
    """int64 [2, count], always the same."""
    return torch.randint(3, 128, (2, count), generator=torch.Generator().manual_seed(0))
