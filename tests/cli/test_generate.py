"""softtrellis generate and softtrellis chat."""

from __future__ import annotations

import io
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from cli.support import Command, Refused

from softtrellis.io.checkpoint import load_quantized, load_tokenizer
from softtrellis.modules.decode import resolve_decode_backend
from softtrellis.recipes.generation import Chat, GenerateConfig, generate_text

SHORT = ["--max-tokens", "8"]
GREEDY = [*SHORT, "--temperature", "0"]


def test_generate_prints_what_follows_the_prompt(softtrellis: Command, checkpoint: Path) -> None:
    greedy = softtrellis("generate", checkpoint, "--prompt", "abc", *SHORT)
    assert greedy.code == 0, greedy.err
    assert "weights: dense, 2 layers decoded once, 16,384 bytes" in greedy.err
    model, tokenizer = load_quantized(checkpoint), load_tokenizer(checkpoint)
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2)[0, 3:]
    assert greedy.out.rstrip("\n") == tokenizer.decode(tokens, skip_special_tokens=True).rstrip()
    packed = softtrellis("generate", checkpoint, "--prompt", "abc", *SHORT, "--weights", "packed")
    assert "weights: packed, 2 layers decoded at every token by torch\n" in packed.err
    assert packed.out == greedy.out
    half = softtrellis("generate", checkpoint, "--prompt", "abc", *SHORT, "--dtype", "bfloat16")
    assert "weights: dense, 2 layers decoded once, 8,192 bytes" in half.err


@pytest.mark.gpu
def test_a_gpu_generates_with_the_codes(softtrellis: Command, checkpoint: Path) -> None:
    packed = softtrellis(
        "generate", checkpoint, "--prompt", "abc", *SHORT, "--device", "cuda", "--dtype", "float32"
    )
    assert packed.code == 0, packed.err
    assert packed.out == softtrellis("generate", checkpoint, "--prompt", "abc", *SHORT).out
    half = softtrellis("generate", checkpoint, "--prompt", "abc", *SHORT, "--device", "cuda")
    assert half.code == 0, half.err
    activations = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    backend = resolve_decode_backend("auto", activations)
    assert backend != "torch"
    assert f"weights: packed, 2 layers decoded at every token by {backend}\n" in half.err
    assert half.out.strip()


def test_packed_weights_name_who_decodes_them(
    softtrellis: Command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, torch.dtype, str]] = []

    def resolve(backend: str, x: torch.Tensor) -> str:
        asked.append((backend, x.dtype, x.device.type))
        return "cuda"

    monkeypatch.setattr("softtrellis.modules.decode.resolve_decode_backend", resolve)
    options = [*SHORT, "--weights", "packed", "--dtype", "bfloat16"]
    result = softtrellis("generate", checkpoint, "--prompt", "abc", *options)
    assert "weights: packed, 2 layers decoded at every token by cuda\n" in result.err
    assert asked == [("auto", torch.bfloat16, "cpu")]


def test_a_full_precision_model_generates_too(softtrellis: Command, model: Path) -> None:
    result = softtrellis("generate", model, "--prompt", "abc", *SHORT)
    assert result.code == 0, result.err
    assert result.out.strip()
    assert "weights:" not in result.err


@pytest.mark.parametrize("command", [["generate", "--prompt", "abc"], ["chat"]], ids=str)
def test_seeds_that_no_generator_takes(
    refused: Refused, checkpoint: Path, command: list[str]
) -> None:
    message = refused(*command, checkpoint, "--seed", "99999999999999999999999", code=2)
    assert message == "--seed must be from 0 to 2**63 - 1, got 99999999999999999999999"


def test_sampling_follows_the_seed(softtrellis: Command, checkpoint: Path) -> None:
    def sample(seed: int) -> str:
        options = [*SHORT, "--temperature", "1.5", "--top-p", "0.99", "--seed", str(seed)]
        return softtrellis("generate", checkpoint, "--prompt", "abc", *options).out

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_what_save_pretrained_wrote_is_read(
    softtrellis: Command, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    import_module("softtrellis.integrations.transformers")
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    load_tokenizer(checkpoint).save_pretrained(tmp_path / "again")
    first = softtrellis("generate", checkpoint, "--prompt", "abc", *SHORT)
    assert softtrellis("generate", tmp_path / "again", "--prompt", "abc", *SHORT).out == first.out


def chat(monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))


def test_chat_answers_each_line(
    softtrellis: Command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat(monkeypatch, "abc\n\nabc\n/reset\nabc\n/exit\nabc\n")
    result = softtrellis("chat", checkpoint, *GREEDY)
    assert result.code == 0, result.err
    model, tokenizer = load_quantized(checkpoint), load_tokenizer(checkpoint)
    said = Chat(model, tokenizer, GenerateConfig(max_tokens=8))
    first, second = said.reply("abc"), said.reply("abc")
    assert [m["role"] for m in said.messages] == ["user", "assistant"] * 2
    expected = f"{first}\n{second}\n{first}\n"
    assert result.out.split() == expected.split()
    said.reset()
    assert said.reply("abc") == first


def test_chat_ends_with_its_input(
    softtrellis: Command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat(monkeypatch, "abc")
    assert softtrellis("chat", checkpoint, "--system", "be brief", *SHORT).out.count("\n") >= 1


def test_a_message_that_is_too_long_does_not_end_the_chat(
    softtrellis: Command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat(monkeypatch, "abc\nabd\n")
    expected = softtrellis("chat", checkpoint, *GREEDY)
    chat(monkeypatch, f"abc\n{'c' * 300}\nabd\n")
    result = softtrellis("chat", checkpoint, *GREEDY)
    assert result.code == 0, result.err
    assert result.out == expected.out
    (message,) = [line for line in result.err.splitlines() if "error" in line]
    assert message.startswith(
        "softtrellis: error: the message has 300 tokens and up to 8 may follow"
    )


def test_no_template_is_found_before_weights_are_loaded(
    refused: Refused, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    (copy / "model.safetensors").unlink()
    chat(monkeypatch, "abc\n")
    assert "the model has no chat template" in refused("chat", copy, code=1)


def test_chat_leaves_out_the_oldest_turns(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load_quantized(checkpoint), load_tokenizer(checkpoint)
    said = Chat(model, tokenizer, GenerateConfig(max_tokens=100), system="s")
    said.reply("a" * 60)
    said.reply("b" * 60)
    assert "left out" in caplog.text
    assert [m["content"][:1] for m in said.messages[:2]] == ["s", "b"]
    with pytest.raises(ValueError, match="the model's context is 256"):
        said.reply("c" * 200)
    assert [m["content"][:1] for m in said.messages[:2]] == ["s", "b"]


def test_chat_needs_a_template(checkpoint: Path) -> None:
    model, tokenizer = load_quantized(checkpoint), load_tokenizer(checkpoint)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Chat(model, tokenizer, GenerateConfig())


def test_the_seed_does_not_depend_on_what_was_drawn_before(checkpoint: Path) -> None:
    model, tokenizer = load_quantized(checkpoint), load_tokenizer(checkpoint)
    config = GenerateConfig(max_tokens=8, temperature=2.0, seed=3)
    first = generate_text(model, tokenizer, "abc", config)
    torch.rand(7)
    assert generate_text(model, tokenizer, "abc", config) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "--temperature must be 0 or more, got -1.0"),
        (["--top-p", "0"], "--top-p must be above 0 and at most 1, got 0.0"),
        (["--prompt", ""], "--prompt must have at least one token"),
    ],
)
def test_senseless_options(
    refused: Refused, checkpoint: Path, options: list[str], message: str
) -> None:
    assert refused("generate", checkpoint, "--prompt", "abc", *options, code=2) == message


def test_no_model(refused: Refused, tmp_path: Path) -> None:
    assert "no-model" in refused("chat", tmp_path / "no-model", code=1)


def test_the_context_ends_the_text(
    softtrellis: Command, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "a" * 250
    result = softtrellis("generate", checkpoint, "--prompt", prompt, "--max-tokens", "100")
    assert result.code == 0, result.err
    assert "the model's context of 256 tokens ends the text after " in caplog.text
    result = softtrellis("generate", checkpoint, "--prompt", "a" * 300)
    assert (result.code, result.out) == (1, "")
    assert "the prompt has 300 tokens, and the model's context is 256; shorten it" in result.err


def test_no_tokenizer(refused: Refused, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import_module("softtrellis.integrations.transformers")
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    message = refused("generate", tmp_path / "again", "--prompt", "abc", code=1)
    assert "no tokenizer beside the weights; save it there" in message
