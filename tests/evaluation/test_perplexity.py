from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from softtrellis.evaluation.perplexity import score_many, score_windows, split_head
from softtrellis.io.sources import load_source
from softtrellis.io.text import load_documents, token_windows


class Bigram(nn.Module):
    """Logits of the next token are a row of a table."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]


def perturbed(model: nn.Module, scale: float = 0.05) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return other


def windows_of(vocabulary: int, count: int = 5, ctx: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(vocabulary, (count, ctx), generator=generator)


@torch.no_grad()
def naive(model: nn.Module, reference: nn.Module, windows: torch.Tensor):
    """All logits of all windows at once, in double precision."""
    q = model(windows).logits[:, :-1].double().log_softmax(-1)
    p = reference(windows).logits[:, :-1].double().log_softmax(-1)
    nll = -q.gather(2, windows[:, 1:, None])[..., 0].sum(1)
    kl = nn.functional.kl_div(q, p, log_target=True, reduction="none").sum((1, 2))
    return nll, kl


def tiny(kind: str) -> nn.Module:
    """Random models whose logits are, and are not, their output layer of their hidden states."""
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        GraniteConfig,
        GraniteForCausalLM,
    )

    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        match kind:
            case "gpt2":
                return GPT2LMHeadModel(
                    GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=2)
                )
            case "granite":
                return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0))
            case "cohere":
                return CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.25))
            case _:
                return Gemma2ForCausalLM(
                    Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=30.0)
                )


def test_against_the_naive_way(tiny_llama):
    student, windows = perturbed(tiny_llama), windows_of(128)
    scores = score_windows(student, windows, reference=tiny_llama)
    nll, kl = naive(student, tiny_llama, windows)
    assert scores.nll.dtype == scores.kl.dtype == torch.float64
    torch.testing.assert_close(scores.nll, nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(scores.kl, kl, rtol=1e-4, atol=1e-6)
    assert kl.min() > 0.1
    assert scores.tokens.tolist() == [23] * 5
    assert scores.perplexity == pytest.approx(math.exp(nll.sum() / (5 * 23)))
    assert scores.kl_mean == pytest.approx(float(kl.sum()) / (5 * 23), rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "granite", "cohere", "gemma2"])
def test_logits_that_are_more_than_the_output_layer(kind):
    model, windows = tiny(kind).eval(), windows_of(96)
    student = perturbed(model)
    scores = score_windows(student, windows, reference=model, chunk=10)
    nll, kl = naive(student, model, windows)
    torch.testing.assert_close(scores.nll, nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(scores.kl, kl, rtol=1e-4, atol=1e-6)
    features = split_head(model, windows[0]).features(windows)
    assert features.shape == (5 * 23, 32 if kind == "gpt2" else 96)


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 1), (2, 7), (3, 23), (5, 10_000)])
def test_batches_and_chunks_change_nothing(tiny_llama, batch_size, chunk):
    student, windows = perturbed(tiny_llama), windows_of(128)
    expected = score_windows(student, windows, reference=tiny_llama)
    found = score_windows(
        student, windows, reference=tiny_llama, batch_size=batch_size, chunk=chunk
    )
    torch.testing.assert_close(found.nll, expected.nll, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.kl, expected.kl, rtol=1e-4, atol=1e-6)


def test_logits_are_made_by_the_chunk(tiny_llama):
    rows = []
    tiny_llama.lm_head.register_forward_hook(lambda *args: rows.append(args[2].numel() // 128))
    windows = windows_of(128, count=4, ctx=200)
    score_windows(tiny_llama, windows, batch_size=4, chunk=50)
    probes, chunks = rows[:2], rows[2:]
    assert max(probes) <= 64
    assert max(chunks) <= 50
    assert sum(chunks) == 4 * 199


def test_several_models_and_a_reference(tiny_llama):
    windows = windows_of(128)
    models = {"a": perturbed(tiny_llama, 0.02), "base": tiny_llama, "b": perturbed(tiny_llama)}
    scores = score_many(models, windows, "base", progress=True)
    assert list(scores) == ["a", "base", "b"]
    assert scores["base"].kl_mean == 0
    for name in ("a", "b"):
        alone = score_windows(models[name], windows, reference=tiny_llama)
        assert torch.equal(scores[name].nll, alone.nll)
        assert torch.equal(scores[name].kl, alone.kl)
    assert 0 < scores["a"].kl_mean < scores["b"].kl_mean
    assert score_windows(copy.deepcopy(tiny_llama), windows, reference=tiny_llama).kl_mean == 0


def test_each_model_runs_once_per_window(tiny_llama):
    calls = []
    tiny_llama.model.register_forward_hook(lambda *_: calls.append(1))
    models = {"base": tiny_llama, "a": perturbed(tiny_llama), "b": perturbed(tiny_llama)}
    score_many(models, windows_of(128), "base")
    assert len(calls) == 3 * (5 + 2)  # the copies carry the hook; two probes each


def test_closed_forms():
    uniform = Bigram(torch.zeros(7, 7))
    odds = Bigram(torch.tensor([3.0, 1, 1, 1, 1, 1, 1]).log().expand(7, 7).clone())
    windows = windows_of(7)
    scores = score_windows(uniform, windows, reference=odds)
    assert scores.perplexity == pytest.approx(7)
    p = torch.tensor([3.0, 1, 1, 1, 1, 1, 1]) / 9
    assert scores.kl_mean == pytest.approx(float((p * (7 * p).log()).sum()))


def test_without_reference(tiny_llama):
    scores = score_windows(tiny_llama, windows_of(128))
    assert scores.kl is None
    assert scores.kl_mean is None


def test_double_and_half_precision(tiny_llama):
    windows = windows_of(128)
    nll, _ = naive(copy.deepcopy(tiny_llama).double(), tiny_llama, windows)
    double = score_windows(copy.deepcopy(tiny_llama).double(), windows)
    torch.testing.assert_close(double.nll, nll, rtol=1e-12, atol=0)
    half = copy.deepcopy(tiny_llama).bfloat16()
    assert split_head(half, windows[0]).features(windows).shape[1] == 64
    torch.testing.assert_close(score_windows(half, windows).nll, nll, rtol=0.02, atol=0)


def test_model_is_left_as_it_was(tiny_llama):
    tiny_llama.config.attention_dropout = 0.5
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.5
    windows = windows_of(128)
    expected = score_windows(tiny_llama, windows).nll
    tiny_llama.train()
    tiny_llama.lm_head.eval()
    assert torch.equal(score_windows(tiny_llama, windows).nll, expected)
    assert tiny_llama.training
    assert tiny_llama.model.layers[0].mlp.training
    assert not tiny_llama.lm_head.training
    assert all(p.grad is None and p.requires_grad for p in tiny_llama.parameters())


class TestBadInput:
    def test_token_outside_the_vocabulary(self, tiny_llama):
        with pytest.raises(ValueError, match="from 5 to 128, 'model' knows 0 to 127"):
            score_windows(tiny_llama, torch.tensor([[5, 128]]))

    def test_different_vocabularies(self, tiny_llama):
        models = {"student": Bigram(torch.zeros(96, 96)), "teacher": tiny_llama}
        with pytest.raises(ValueError, match=r"'student' has a vocabulary of 96.*128"):
            score_many(models, windows_of(96), "teacher")

    def test_broken_weights(self, tiny_llama):
        broken = copy.deepcopy(tiny_llama)
        broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
        with pytest.raises(ValueError, match="logits of 'broken' hold NaN"):
            score_many({"fine": tiny_llama, "broken": broken}, windows_of(128), "fine")

    @pytest.mark.parametrize(
        "windows",
        [
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(0, 4, dtype=torch.int64),
            torch.zeros(2, 1, dtype=torch.int64),
            torch.zeros(2, 4),
        ],
    )
    def test_windows(self, tiny_llama, windows):
        with pytest.raises(ValueError, match=r"windows must be|ctx must be"):
            score_windows(tiny_llama, windows)

    def test_options(self, tiny_llama):
        with pytest.raises(ValueError, match="'b' is not among a"):
            score_many({"a": tiny_llama}, windows_of(128), "b")
        with pytest.raises(ValueError, match="no model"):
            score_many({}, windows_of(128))
        with pytest.raises(ValueError, match="chunk"):
            score_windows(tiny_llama, windows_of(128), chunk=0)


def test_stories260k(stories260k, shared_data):
    source = load_source(str(stories260k))
    text = load_documents([str(shared_data / "tinystories.txt")], split="heldout")[0]
    stories = [story.strip() for story in text.split("<|endoftext|>")]
    windows = token_windows(source.tokenizer, stories, 256, limit=40)
    scores = score_windows(source.model, windows, batch_size=10)
    assert scores.perplexity == pytest.approx(3.8553, rel=1e-4)


def wikitext2_windows(source, shared_data, limit):
    documents = load_documents([str(shared_data / "wikitext2_test.txt")], split="heldout")
    return token_windows(source.tokenizer, documents, 2048, limit=limit)


def test_smollm2_on_the_start_of_wikitext2(smollm2_source, shared_data):
    windows = wikitext2_windows(smollm2_source, shared_data, 1)[:, :256]
    scores = score_windows(smollm2_source.model, windows)
    assert scores.nll.tolist() == pytest.approx([909.1201], rel=1e-5)


@pytest.mark.slow
def test_smollm2_on_20_windows_of_wikitext2(smollm2_source, shared_data):
    windows = wikitext2_windows(smollm2_source, shared_data, 20)
    scores = score_windows(smollm2_source.model, windows)
    assert scores.perplexity == pytest.approx(20.9667, abs=0.003)
