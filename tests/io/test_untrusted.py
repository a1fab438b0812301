"""Files from strangers: whatever is in them, they are read, or a ValueError says why not.

``pytest tests/io -k untrusted --hypothesis-profile=long`` tries many more of them.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from untrusted import altered, bounded, copy_of, damaged

from softtrellis.evaluation.run_log import read_run
from softtrellis.io.checkpoint import (
    WEIGHTS,
    LoadConfig,
    base_of,
    load_quantized,
    load_tokenizer,
    save_quantized,
)
from softtrellis.io.files import STATE, sha256_of, write_json
from softtrellis.io.manifest import MANIFEST, CheckpointError, read_manifest
from softtrellis.io.sources import load_source
from softtrellis.io.tensor_files import INDEX
from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.replace import quantized_layers
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.ranks import ONE
from softtrellis.recipes.run_state import RunLog, load_state, save_state
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.packing import pack, unpack, words_per_tile

LAYERS = ("1.mlp.down_proj", "1.self_attn.k_proj")
SHARED = "train_state-0123abcd"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("untrusted")


@pytest.fixture
def checkpoint(shelf: Path, request: pytest.FixtureRequest) -> Path:
    """A good checkpoint with a table; copy it before changing it."""
    path = shelf / "checkpoint"
    if not path.exists():
        source = load_source(str(request.getfixturevalue("tiny_directory")))
        base = base_of(source)
        config = QuantizeConfig(L=10, layers=LAYERS, error_feedback=False, backend="torch")
        path.mkdir()
        save_quantized(quantize_model(source.model, config), source.tokenizer, path, base=base)
    return path


def sign(directory: Path) -> None:
    """Makes the manifest's checksums those of the files, as someone would who means harm."""
    manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    for name in manifest["files"]:
        path = directory / name
        manifest["files"][name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    write_json(directory / MANIFEST, manifest)


def read(directory: Path, **options: Any) -> None:
    """Reads a checkpoint as far as it goes."""
    with bounded(directory.parent), suppress(ValueError):
        model = load_quantized(directory, LoadConfig(**options))
        load_tokenizer(directory)
        for layer in quantized_layers(model).values():
            assert layer.weight().shape == (layer.out_features, layer.in_features)


# Our checkpoints


@given(data=st.data())
def test_bytes_of_a_checkpoint(checkpoint: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from([WEIGHTS, "config.json", "tokenizer.json", MANIFEST]))
    with copy_of(checkpoint) as directory:
        (directory / file).write_bytes(data.draw(damaged((directory / file).read_bytes())))
        if file != MANIFEST:
            if (directory / file).read_bytes() != (checkpoint / file).read_bytes():
                with pytest.raises(CheckpointError):
                    load_quantized(directory)
            sign(directory)
        read(directory)


@given(data=st.data())
def test_values_of_a_checkpoint(checkpoint: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from([MANIFEST, "config.json"]))
    value = data.draw(altered(json.loads((checkpoint / file).read_text("utf-8"))))
    with copy_of(checkpoint) as directory:
        (directory / file).write_text(json.dumps(value), "utf-8")
        read(directory, verify=False)


@given(data=st.data())
def test_tensors_of_a_checkpoint(checkpoint: Path, data: st.DataObject) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    change = data.draw(st.sampled_from(["remove", "rename", "shape", "dtype", "flat", "nan"]))
    if change == "rename":
        tensors[data.draw(st.sampled_from(["", "x", "../x", "softtrellis.table.1"]))] = tensor
    elif change == "shape":
        shape = data.draw(st.lists(st.integers(0, 40), max_size=4))
        tensors[name] = torch.zeros(shape, dtype=tensor.dtype)
    elif change == "dtype":
        dtypes = [torch.float16, torch.float64, torch.int16, torch.bool, torch.float8_e5m2]
        tensors[name] = tensor.float().to(data.draw(st.sampled_from(dtypes)))
    elif change == "flat":
        tensors[name] = tensor.flatten()
    elif change == "nan" and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, torch.nan)
    with copy_of(checkpoint) as directory:
        save_file(tensors, directory / WEIGHTS)
        read(directory, verify=False)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "", "x\\y", "x\0y"])
def test_a_manifest_that_leads_elsewhere(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret", "utf-8")
    directory = shutil.copytree(checkpoint, tmp_path / "model")
    manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
    manifest["files"][name] = {"sha256": "0", "bytes": 6}
    write_json(directory / MANIFEST, manifest)
    with pytest.raises(CheckpointError, match="no file beside it"):
        read_manifest(directory)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**10),
        ("hidden_size", 10**7),
        ("intermediate_size", 10**12),
        ("head_dim", 10**9),
    ],
)
def test_claims_of_a_configuration(checkpoint: Path, key: str, value: int) -> None:
    with copy_of(checkpoint) as directory:
        settings = json.loads((directory / "config.json").read_text("utf-8"))
        write_json(directory / "config.json", settings | {key: value})
        sign(directory)
        with bounded(directory.parent), pytest.raises(CheckpointError):
            load_quantized(directory)


def test_codes_without_end(checkpoint: Path) -> None:
    with copy_of(checkpoint) as directory:
        manifest = json.loads((directory / MANIFEST).read_text("utf-8"))
        (code,) = manifest["codes"]
        layer = next(iter(manifest["layers"].values()))
        manifest["codes"] = [code | {"seed": seed} for seed in range(1000)]
        manifest["layers"] = {f"layer{i}": layer | {"code": i} for i in range(1000)}
        write_json(directory / MANIFEST, manifest)
        with bounded(directory.parent), pytest.raises(CheckpointError, match="more than 32 codes"):
            read_manifest(directory)


# JSON, logs and states


@given(data=st.data())
def test_quantization_config(checkpoint: Path, data: st.DataObject) -> None:
    from softtrellis.integrations.transformers import SofttrellisConfig

    value = json.loads((checkpoint / "config.json").read_text("utf-8"))["quantization_config"]
    value = data.draw(altered(value))
    with bounded(checkpoint), suppress(ValueError):
        if isinstance(value, dict) and value.keys() <= {*SofttrellisConfig().__dict__}:
            _ = SofttrellisConfig(**value).formats


@given(data=st.data())
def test_logs_and_results(shelf: Path, data: st.DataObject) -> None:
    good = {
        "log.jsonl": {"step": 0, "loss": 1.0, "layers": {"a": {"drift": 0.1}}},
        "results.json": {
            "rows": [{"name": "PTQ", "perplexity": 9.0, "bytes": 3}],
            "windows": {"PTQ": {"nll": [1.0], "kl": [], "tokens": [3]}},
            "comparisons": [
                {"a": "x", "b": "y", "metric": "kl", "mean": 0.0, "low": 0.0, "high": 1.0}
            ],
            "settings": {"ctx": 32},
        },
    }
    directory = shelf / "run"
    directory.mkdir(exist_ok=True)
    for name, value in good.items():
        text = json.dumps(data.draw(altered(value))).encode() + b"\n"
        if data.draw(st.booleans()):
            text = data.draw(damaged(text))
        (directory / name).write_bytes(text)
    with bounded(directory), suppress(ValueError):
        read_run(directory)


@given(data=st.data())
def test_saved_states(shelf: Path, data: st.DataObject) -> None:
    directory = shelf / "state"
    directory.mkdir(exist_ok=True)
    save_state(directory, {"a": torch.zeros(8)}, step=1, settings={"lr": 0.1})
    (path,) = directory.iterdir()
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with bounded(directory), suppress(ValueError):
        load_state(directory, settings={"lr": 0.1})
    path.unlink()


@pytest.fixture
def shared_state(shelf: Path, checkpoint: Path) -> tuple[Path, dict[str, LatentLinear]]:
    """A state that two ranks saved, and the layers that go on with it."""
    quantized = quantized_layers(load_quantized(checkpoint))
    name = next(name for name in quantized if name.endswith(LAYERS[1]))
    layers = {name: LatentLinear.from_quantized(quantized[name])}
    directory = shelf / "shared"
    if not directory.exists():
        whole = {}
        for name, layer in layers.items():
            tiles = layer.tiles().detach()
            whole |= {f"0/{name}.latent": tiles, f"0/{name}.latent.exp_avg": tiles.clone()}
            whole[f"0/{name}.pins"] = layer.pins
        (directory / SHARED).mkdir(parents=True)
        most = -(-len(layer.pins) // 2)
        for rank in range(2):
            part = slice(rank * most, rank * most + most)
            places = {
                k: {"saved_offsets": [rank * most] + [0] * (t.ndim - 1)} for k, t in whole.items()
            }
            written = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"}
            own = {k: t[part].contiguous() for k, t in whole.items()}
            save_file(own, directory / SHARED / f"shard-0000{rank + 1}.safetensors", written)
        metadata = {"step": "1", "settings": "{}", "shared": SHARED}
        metadata["shared_names"] = json.dumps(sorted(whole))
        save_file({"0/skipped": torch.tensor(0)}, directory / STATE, metadata)
        assert load_state(directory, settings={}).part("0/", layers, ONE).keys() > {"skipped"}
    return directory, layers


def read_state(directory: Path, layers: dict[str, LatentLinear]) -> None:
    """Reads a state as far as it goes."""
    with bounded(directory), suppress(ValueError):
        found = load_state(directory, settings={}).part("0/", layers, ONE)
        for name, layer in layers.items():
            if f"{name}.latent" in found:
                assert found[f"{name}.latent"].shape == layer.latent.shape


@given(data=st.data())
def test_bytes_of_a_state_of_several_ranks(
    shared_state: tuple[Path, dict[str, LatentLinear]], data: st.DataObject
) -> None:
    whole, layers = shared_state
    with copy_of(whole) as directory:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        path = data.draw(st.sampled_from(files))
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        read_state(directory, layers)


@given(data=st.data())
def test_values_of_a_state_of_several_ranks(
    shared_state: tuple[Path, dict[str, LatentLinear]], data: st.DataObject
) -> None:
    """Places of parts, names of tensors and of the directory."""
    whole, layers = shared_state
    with copy_of(whole) as directory:
        path = directory / SHARED / "shard-00002.safetensors"
        key = "DCP_SHARDING_INFO"
        if data.draw(st.booleans()):
            path, key = directory / STATE, data.draw(st.sampled_from(["shared", "shared_names"]))
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata()
        if key == "shared":
            metadata[key] = data.draw(
                st.sampled_from(["..", ".", "", "/", "../shared", "x", SHARED])
            )
        else:
            metadata[key] = json.dumps(data.draw(altered(json.loads(metadata[key]))))
        save_file(load_file(path), path, metadata)
        read_state(directory, layers)


@given(data=st.data())
def test_logs_that_a_run_goes_on_with(shelf: Path, data: st.DataObject) -> None:
    directory = shelf / "log"
    directory.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"step": i, "seconds": 0.1}) + "\n" for i in range(3))
    (directory / "log.jsonl").write_bytes(data.draw(damaged(lines.encode())))
    with suppress(ValueError):
        assert [record["step"] for record in RunLog(directory, resume_at=2).records] == [0, 1]


# Packed codes


@given(data=st.data())
def test_packed_words(data: st.DataObject) -> None:
    """Any words are paths that pack to the same words; all else is a ValueError."""
    k, V = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2]))
    spec = TrellisSpec(data.draw(st.integers(max(4, k * V + 1), 16)), k, V)
    least = max(1, spec.min_closed_steps)
    steps = data.draw(st.integers(least, 40).filter(lambda n: n * spec.shift % 16 == 0))
    width = words_per_tile(spec, steps)
    seed = data.draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**15), 2**15, (3, width), generator=generator).to(torch.int16)
    assert torch.equal(pack(unpack(words, spec, steps=steps), spec), words)
    dtype = data.draw(st.sampled_from([torch.int32, torch.float16, torch.uint8, torch.bool]))
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    for wrong in (words.to(dtype), words[:, :-1], words[0], words.new_zeros(shape)):
        if wrong.dtype != torch.int16 or wrong.ndim != 2 or wrong.shape[1] != width:
            with pytest.raises(ValueError, match="words"):
                unpack(wrong, spec, steps=steps)
    for count in (0, -1, 10**12):
        with pytest.raises(ValueError, match="steps"):
            unpack(words, spec, steps=count)
    states = torch.randint(0, spec.num_states + 1, (2, steps), generator=generator)
    with suppress(ValueError):
        assert torch.equal(unpack(pack(states, spec), spec, steps=steps).long(), states)


# Code and files of others


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_in_a_model_is_not_run(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Nor is anyone asked whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = tiny_directory.parent / "ran"
    (tiny_directory / "evil.py").write_text(f"open({str(ran)!r}, 'w')", "utf-8")
    names = {"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.X"}
    for file, auto_map in (
        ("config.json", names),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.X", None]}),
    ):
        value = json.loads((tiny_directory / file).read_text("utf-8")) | {"auto_map": auto_map}
        if file == "config.json":
            value["model_type"] = model_type
        write_json(tiny_directory / file, value)
    with suppress(ValueError):
        load_source(str(tiny_directory))
    assert not ran.exists()


def test_an_index_of_a_model_that_leads_elsewhere(tiny_directory: Path) -> None:
    shutil.copy(tiny_directory / WEIGHTS, tiny_directory.parent / "other.safetensors")
    names = load_file(tiny_directory / WEIGHTS)
    (tiny_directory / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../other.safetensors")}
    write_json(tiny_directory / INDEX, index)
    with pytest.raises(ValueError, match="no safetensors file beside it"):
        load_source(str(tiny_directory))
