from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.teacher_text import (
    GREEDY_TOKENS,
    _windows_at_once,
    is_teacher_text,
    sample_windows,
)


@pytest.fixture
def unbiased(tiny_llama):
    """The tiny model with generation settings that must not matter, as downloaded ones have."""
    tiny_llama.generation_config.update(
        eos_token_id=list(range(3, 40)), top_k=1, repetition_penalty=3.0, max_length=5
    )
    return tiny_llama


def test_shape_and_tokens(unbiased, tiny_tokenizer):
    windows = sample_windows(unbiased, tiny_tokenizer, 5, 24, seed=0, batch=2)
    assert (windows.shape, windows.dtype) == ((5, 24), torch.int64)
    assert (windows[:, 0] == tiny_tokenizer.bos_token_id).all()
    assert int(windows.max()) < len(tiny_tokenizer) < unbiased.config.vocab_size
    assert len(windows.unique(dim=0)) == 5


def test_the_seed_decides(tiny_llama, tiny_tokenizer):
    state = torch.get_rng_state()
    windows = sample_windows(tiny_llama, tiny_tokenizer, 4, 16, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(sample_windows(tiny_llama, tiny_tokenizer, 4, 16, seed=7), windows)
    assert not torch.equal(sample_windows(tiny_llama, tiny_tokenizer, 4, 16, seed=8), windows)


def test_the_model_is_left_as_it_was(unbiased, tiny_tokenizer):
    unbiased.train()
    before = unbiased.generation_config
    sample_windows(unbiased, tiny_tokenizer, 1, 8, seed=0)
    assert unbiased.training
    assert unbiased.generation_config is before


def test_tokens_are_drawn_from_the_models_distribution(unbiased, tiny_tokenizer):
    windows = sample_windows(unbiased, tiny_tokenizer, 4000, 2, seed=0, batch=4000)
    with torch.no_grad():
        logits = unbiased(windows[:1, :1]).logits[0, 0]
    logits[len(tiny_tokenizer) :] = -torch.inf
    shares = torch.bincount(windows[:, 1], minlength=len(logits)) / len(windows)
    expected = logits.softmax(-1)
    assert (shares - expected).abs().max() < 4 * (expected * (1 - expected) / 4000).sqrt().max()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_the_most_likely_only(unbiased, tiny_tokenizer, options):
    windows = sample_windows(unbiased, tiny_tokenizer, 2, 12, seed=0, **options)
    with torch.no_grad():
        logits = unbiased(windows).logits[..., : len(tiny_tokenizer)]
    assert torch.equal(windows[:, 1:], logits.argmax(-1)[:, :-1])


def test_after_eos_comes_a_new_document(tiny_llama, tiny_tokenizer):
    with torch.no_grad():  # EOS and BOS are likely everywhere
        tiny_llama.model.embed_tokens.weight[1:3] *= 3
    windows = sample_windows(tiny_llama, tiny_tokenizer, 16, 64, seed=0)
    at, eos = windows[:, 1:-1], tiny_tokenizer.eos_token_id
    following = windows[:, 2:][at == eos]
    assert len(following) > 16
    assert (following != eos).any()


class TestWithoutBos:
    @pytest.fixture
    def no_bos(self, tiny_tokenizer):
        tiny_tokenizer.bos_token = None
        return tiny_tokenizer

    def test_random_first_token_then_the_likeliest_then_drawn(self, unbiased, no_bos):
        windows = sample_windows(unbiased, no_bos, 64, 16, seed=0)
        assert len(windows[:, 0].unique()) > 20
        assert not set(windows[:, 0].tolist()) & set(no_bos.all_special_ids)
        with torch.no_grad():
            likeliest = unbiased(windows).logits[..., : len(no_bos)].argmax(-1)[:, :-1]
        same = likeliest == windows[:, 1:]
        assert same[:, :GREEDY_TOKENS].all()
        assert not same[:, GREEDY_TOKENS:].all(dim=0).any()

    @pytest.mark.parametrize("ctx", [2, GREEDY_TOKENS, GREEDY_TOKENS + 1, GREEDY_TOKENS + 2])
    def test_short_windows(self, tiny_llama, no_bos, ctx):
        assert sample_windows(tiny_llama, no_bos, 3, ctx, seed=0).shape == (3, ctx)


class TestCache:
    def test_is_used(self, tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
        windows = sample_windows(tiny_llama, tiny_tokenizer, 3, 8, seed=0, cache=tmp_path / "c")
        monkeypatch.setattr(tiny_llama, "generate", None)
        again = sample_windows(tiny_llama, tiny_tokenizer, 3, 8, seed=0, cache=tmp_path / "c")
        assert torch.equal(again, windows)
        assert len(list((tmp_path / "c").iterdir())) == 1

    @pytest.mark.parametrize(
        "change",
        [{"seed": 1}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.5}, {"batch": 1}, {"ctx": 9}],
    )
    def test_other_settings_are_another_text(self, tiny_llama, tiny_tokenizer, tmp_path, change):
        settings = {"count": 3, "ctx": 8, "seed": 0, "cache": tmp_path}
        sample_windows(tiny_llama, tiny_tokenizer, **settings)
        sample_windows(tiny_llama, tiny_tokenizer, **(settings | change))
        assert len(list(tmp_path.iterdir())) == 2

    def test_other_weights_are_another_text(self, tiny_llama, tiny_tokenizer, tmp_path):
        for _ in range(2):
            sample_windows(tiny_llama, tiny_tokenizer, 3, 8, seed=0, cache=tmp_path)
            with torch.no_grad():  # the fingerprint does not see linear layers
                tiny_llama.model.layers[0].mlp.down_proj.weight.neg_()
        assert len(list(tmp_path.iterdir())) == 2

    def test_nothing_is_left_of_a_failure(self, tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
        def stops(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(tiny_llama, "generate", stops)
        with pytest.raises(KeyboardInterrupt):
            sample_windows(tiny_llama, tiny_tokenizer, 3, 8, seed=0, cache=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_damaged(self, tiny_llama, tiny_tokenizer, tmp_path):
        sample_windows(tiny_llama, tiny_tokenizer, 3, 8, seed=0, cache=tmp_path)
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ValueError, match="is damaged: delete it"):
            sample_windows(tiny_llama, tiny_tokenizer, 3, 8, seed=0, cache=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"ctx": 1}, "ctx must be at least 2"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
    ],
)
def test_settings_out_of_range(tiny_llama, tiny_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        sample_windows(tiny_llama, tiny_tokenizer, **({"count": 2, "ctx": 8, "seed": 0} | options))


class TestCalibration:
    def test_a_model_is_quantized_on_its_own_text(
        self, tiny_llama, tiny_tokenizer, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        config = QuantizeConfig(
            L=4, code="1mad", layers=("1.mlp.down_proj",), data=("teacher",), ctx=32, windows=4
        )
        quantize_model(tiny_llama, config, tokenizer=tiny_tokenizer)
        assert len(list((tmp_path / "softtrellis" / "teacher_text").iterdir())) == 1

    def test_alone(self):
        assert is_teacher_text(["teacher"])
        assert not is_teacher_text(["pydoc", "teacher.txt"])
        with pytest.raises(ValueError, match="'teacher' cannot be mixed"):
            QuantizeConfig(data=("teacher", "pydoc"))


@pytest.mark.gpu
def test_on_a_gpu(tiny_llama, tiny_tokenizer):
    state = torch.cuda.get_rng_state()
    windows = sample_windows(tiny_llama, tiny_tokenizer, 8, 32, seed=0, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert tiny_llama.device.type == "cpu"
    assert windows.device.type == "cpu"
    again = sample_windows(tiny_llama.to("cuda"), tiny_tokenizer, 8, 32, seed=0)
    assert torch.equal(again, windows)


def test_a_gpu_draws_as_many_windows_at_once_as_take_a_quarter_of_its_memory(
    tiny_llama, monkeypatch
):
    config = tiny_llama.config
    window = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 64 * 2
    gpu = torch.device("cuda")
    for windows, expected in ((0, 1), (1, 1), (7, 4), (8, 8), (1 << 20, 1024)):
        memory = SimpleNamespace(total_memory=4 * window * windows)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, memory=memory: memory)
        assert _windows_at_once(tiny_llama, 64, torch.bfloat16, gpu) == expected
    assert _windows_at_once(tiny_llama, 64, torch.float32, torch.device("cpu")) == 128


def test_another_dtype_leaves_the_model_as_it_was(tiny_llama, tiny_tokenizer, tmp_path):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    settings = {"seed": 0, "cache": tmp_path}
    sample_windows(tiny_llama, tiny_tokenizer, 3, 8, **settings)
    low = sample_windows(tiny_llama, tiny_tokenizer, 3, 8, dtype=torch.float64, **settings)
    assert low.shape == (3, 8)
    assert tiny_llama.dtype == torch.float32
    assert all(torch.equal(before[name], t) for name, t in tiny_llama.state_dict().items())
    assert len(list(tmp_path.iterdir())) == 2  # another text, under another name
