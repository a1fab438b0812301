"""EXL3 files from strangers: whatever is in them, they load, or a ValueError says why not."""

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
from safetensors.torch import load_file, save_file
from untrusted import ODD, bounded, copy_of, with_damaged_bytes, with_damaged_tensors

from softtrellis.io.checkpoint import WEIGHTS, base_of
from softtrellis.io.exl3 import exl3_code, exl3_layer_format
from softtrellis.io.exl3_export import RECORD, save_exl3
from softtrellis.io.exl3_import import load_exl3
from softtrellis.io.manifest import CheckpointError
from softtrellis.io.sources import load_source
from softtrellis.io.tensor_files import INDEX
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.modules.replace import linear_names, replace_modules
from softtrellis.recipes.exchange import import_from

LAYER = "model.layers.0.mlp.down_proj"
FILES = [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", RECORD]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exl3")


@pytest.fixture
def whole(shelf: Path, request: pytest.FixtureRequest) -> Path:
    """A good model; copy it before changing it."""
    if not (shelf / "whole").exists():
        source = load_source(str(request.getfixturevalue("tiny_directory")))
        base, code = base_of(source), exl3_code("mul1", 2)
        codebook = code.codebook()

        def make(_: str, linear: torch.nn.Module) -> QuantizedLinear:
            size = linear.in_features, linear.out_features
            return QuantizedLinear(exl3_layer_format(*size, code, bias=False), codebook)

        replace_modules(source.model, linear_names(source.model), make)
        (shelf / "whole").mkdir()
        save_exl3(source.model, source.tokenizer, shelf / "whole", base=base)
    return shelf / "whole"


def loads_or_says_why(directory: Path) -> None:
    with bounded(directory.parent), suppress(ValueError):
        load_exl3(directory)


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(value | changes), "utf-8")


@given(file=st.sampled_from(FILES), data=st.data())
def test_bytes(whole: Path, file: str, data: st.DataObject) -> None:
    with with_damaged_bytes(whole, file, data) as directory:
        loads_or_says_why(directory)


@given(data=st.data())
def test_tensors(whole: Path, data: st.DataObject) -> None:
    with with_damaged_tensors(whole, data) as directory:
        loads_or_says_why(directory)


@given(data=st.data(), value=st.sampled_from([*ODD, {"rope_type": "yarn"}]))
def test_settings(whole: Path, data: st.DataObject, value: Any) -> None:
    file = data.draw(st.sampled_from(["config.json", "config.json", RECORD]))
    known = json.loads((whole / file).read_text("utf-8"))
    keys = [*known, "partial_rotary_factor", "attn_implementation", "rope_scaling"]
    key = data.draw(st.sampled_from(keys))
    if isinstance(known.get(key), dict) and known[key] and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from(sorted(known[key])))
        value = known[key] | {inner: value}
    with copy_of(whole) as directory:
        edit(directory / file, **{key: value})
        loads_or_says_why(directory)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None, "x\\y", []],
)
def test_an_index_that_leads_elsewhere(whole: Path, tmp_path: Path, file: Any) -> None:
    directory = shutil.copytree(whole, tmp_path / "model")
    shutil.copy(whole / WEIGHTS, tmp_path / WEIGHTS)
    (directory / INDEX).write_text(json.dumps({"weight_map": {f"{LAYER}.trellis": file}}), "utf-8")
    with pytest.raises(CheckpointError, match="no safetensors file beside"):
        load_exl3(directory)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "holds no JSON object"),
        ("{", "damaged"),
        ("{}", "lists no tensors"),
        ('{"weight_map": {"x": "model.safetensors"}}', "lacks x"),
        ('{"weight_map": {"x": "other.safetensors"}}', r"other\.safetensors is missing"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_index(whole: Path, tmp_path: Path, index: str, message: str) -> None:
    directory = shutil.copytree(whole, tmp_path / "model")
    (directory / INDEX).write_text(index, "utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_exl3(directory)


def test_weights_in_several_files(whole: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(whole, tmp_path / "model")
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, listed in parts.items():
        save_file({name: tensors[name] for name in listed}, directory / file)
    index = {name: file for file, listed in parts.items() for name in listed}
    (directory / INDEX).write_text(json.dumps({"weight_map": index}), "utf-8")
    expected, found = load_exl3(whole).model, load_exl3(directory).model
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    save_file(tensors, directory / "b.safetensors")
    with pytest.raises(CheckpointError, match="in two files"):
        load_exl3(directory)


@pytest.mark.parametrize("damage", ["template", "trellis", "record", "licence"])
def test_nothing_is_written_elsewhere(whole: Path, tmp_path: Path, damage: str) -> None:
    directory = shutil.copytree(whole, tmp_path / "model")
    (tmp_path / "secret").write_text("secret", "utf-8")
    if damage == "template":
        (directory / "chat_template.jinja").unlink()
        templates = [{"name": name, "template": "x"} for name in ("default", "../../../../evil")]
        edit(directory / "tokenizer_config.json", chat_template=templates)
    elif damage == "trellis":
        tensors = load_file(directory / WEIGHTS)
        tensors["../../evil.trellis"] = tensors.pop(f"{LAYER}.trellis")
        save_file(tensors, directory / WEIGHTS)
    elif damage == "record":
        edit(directory / RECORD, base={"name": "../evil\n", "fingerprint": "", "licence": ""})
    else:
        (directory / "LICENSE").symlink_to(tmp_path / "secret")
        (directory / "LICENSES").mkdir()
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    if damage == "licence":
        import_from(directory, tmp_path / "in" / "out")
        assert not (tmp_path / "in" / "out" / "LICENSE").exists(), "the link is not followed"
        return
    with pytest.raises(CheckpointError):
        import_from(directory, tmp_path / "in" / "out")
    assert set(tmp_path.rglob("*")) - {tmp_path / "in"} == before


def test_code_in_a_model_is_not_run(whole: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(whole, tmp_path / "model")
    (directory / "evil.py").write_text("raise SystemExit('run')", "utf-8")
    names = {"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.X"}
    edit(directory / "config.json", auto_map=names, _attn_implementation="someone/kernel")
    edit(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.X", None]})
    with suppress(CheckpointError):  # the tokenizer may be refused
        found = load_exl3(directory)
        assert found.model.config._attn_implementation != "someone/kernel"
