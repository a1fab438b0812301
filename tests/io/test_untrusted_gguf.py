"""GGUF files from strangers: they load, or a ValueError says why not."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from untrusted import bounded, copy_of, damaged

from softtrellis.io.sources import load_source

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture
def gguf_file(
    shelf: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """`tiny_llama` as a GGUF file that loads."""
    path = shelf / "tiny" / "tiny.gguf"
    if path.exists():
        return path
    path.parent.mkdir()
    settings = tiny_llama.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_vocab_size(settings.vocab_size)
    vocabulary = tiny_tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    tokens.append("ab")
    tokens += [f"<{i}>" for i in range(len(tokens), settings.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }
    for name, parameter in tiny_llama.named_parameters():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_good_gguf_file_loads(gguf_file: Path, tiny_llama: LlamaForCausalLM) -> None:
    found = load_source(str(gguf_file)).model
    assert torch.equal(found.get_input_embeddings().weight, tiny_llama.model.embed_tokens.weight)
    assert found.config.dtype == torch.float32


@given(data=st.data())
def test_bytes_of_a_gguf_file(gguf_file: Path, data: st.DataObject) -> None:
    with copy_of(gguf_file.parent) as directory:
        path = directory / gguf_file.name
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        with bounded(directory.parent), suppress(ValueError):
            load_source(str(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 2**31),
        ("embedding_length", 2**30),
        ("feed_forward_length", 2**31),
        ("attention.head_count", 2**20),
        ("vocab_size", 2**31),
    ],
)
def test_claims_of_a_gguf_file(gguf_file: Path, key: str, value: int) -> None:
    with copy_of(gguf_file.parent) as directory:
        path = directory / gguf_file.name
        content = path.read_bytes()
        after = content.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
        path.write_bytes(content[:after] + value.to_bytes(4, "little") + content[after + 4 :])
        with bounded(directory.parent), suppress(ValueError):
            load_source(str(path))
