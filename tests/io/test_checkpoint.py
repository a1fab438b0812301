"""Checkpoints: the same bits back, or an error that says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from softtrellis.io.checkpoint import (
    MANIFEST,
    WEIGHTS,
    CheckpointError,
    base_of,
    check_base,
    load_any,
    load_quantized,
    read_manifest,
    save_quantized,
    size_report,
)
from softtrellis.io.files import OutputExists, whole_directory
from softtrellis.io.manifest import codes_of
from softtrellis.io.sources import load_source
from softtrellis.modules.replace import quantized_layers
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIGS = {
    "gaussian": QuantizeConfig(code="gaussian", L=8, layers=("1",), error_feedback=False),
    "hyb": QuantizeConfig(L=10, layers=("1",), error_feedback=False),
    "exl3": QuantizeConfig(profile="exl3", layers=("1.mlp.up_proj",), error_feedback=False),
}


def make(base_directory: Path, output: Path, name: str = "gaussian") -> PreTrainedModel:
    source = load_source(str(base_directory))
    base = base_of(source)
    model = quantize_model(source.model, CONFIGS[name])
    output.mkdir()
    save_quantized(
        model,
        source.tokenizer,
        output,
        base=base,
        source_directory=source.directory,
        provenance={"quantize": {"seed": 0}},
    )
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_reload_gives_the_same_bits(tiny_directory: Path, tmp_path: Path, name: str) -> None:
    (tiny_directory / "LICENSE").write_text("MIT", encoding="utf-8")
    model = make(tiny_directory, tmp_path / "out", name)
    loaded = load_quantized(tmp_path / "out")
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    for key, layer in quantized_layers(model).items():
        assert torch.equal(layer.weight(), quantized_layers(loaded)[key].weight())
    ids = torch.randint(128, (1, 16))
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "MIT"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n")
    assert load_any(str(tmp_path / "out")).tokenizer.chat_template is not None
    assert load_any(str(tmp_path / "out")).licence == "mit"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (1, [0.744292, 0.801097, 1.420848, 0.761336]),
        (2, [-0.312585, 0.3794, -0.27607, 0.197022]),
        (3, [-0.312713, 0.379828, -0.276204, 0.196633]),
    ],
)
def test_checkpoints_of_every_version_load(version: int, expected: list[float]) -> None:
    """Version 2 as it was before config.json described the layers."""
    folder = Path(__file__).parent / f"checkpoint_v{version}"
    assert read_manifest(folder).version == version
    logits = load_quantized(folder)(torch.arange(16)[None]).logits[0, -1, :4]
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_layers_of_several_codes_and_scales_of_channels(
    tiny_directory: Path, tmp_path: Path
) -> None:
    source = load_source(str(tiny_directory))
    base, model = base_of(source), source.model
    for layers, bits, code in (
        ("*.0.*", 3, "gaussian"),
        ("*.1.mlp.*", 2, "gaussian"),
        ("*.1.self*", 2, "hyb"),
    ):
        config = QuantizeConfig(bits=bits, code=code, L=10, layers=(layers,), error_feedback=False)
        quantize_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for layer in quantized_layers(model).values():
        before = layer.weight()
        si = 1 + 0.1 * torch.randn(layer.in_features, generator=generator)
        so = 1 + 0.1 * torch.randn(layer.out_features, generator=generator)
        layer.set_scales(si, so)
        expected = so.half().float()[:, None] * before * si.half().float()
        torch.testing.assert_close(layer.weight(), expected)
    output = tmp_path / "out"
    output.mkdir()
    save_quantized(model, source.tokenizer, output, base=base)
    manifest = read_manifest(output)
    assert [code.spec.k for code in codes_of(manifest.layers)] == [3, 2, 2]
    loaded = load_quantized(output)
    for key, layer in quantized_layers(model).items():
        assert torch.equal(layer.weight(), quantized_layers(loaded)[key].weight())
    weights = load_file(output / WEIGHTS)
    assert weights["softtrellis.table.1"].shape == (512, 2)
    size = size_report(output)
    stored = sum(sum(x.stored_bits().values()) for x in quantized_layers(model).values())
    tables = sum(32 * x.numel() for name, x in weights.items() if name.startswith("softtrellis."))
    assert size.stored_bits == (stored + tables) / size.weights


def test_sizes_are_counted_from_the_bytes(tiny_directory: Path, tmp_path: Path) -> None:
    model = make(tiny_directory, tmp_path / "out")
    size = size_report(tmp_path / "out")
    layers = quantized_layers(model).values()
    assert size.weights == sum(layer.in_features * layer.out_features for layer in layers)
    assert size.code_bits == 2.0
    assert size.stored_bits > 2.0
    files = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert size.file_bytes == sum(path.stat().st_size for path in files)


def test_no_pickle_anywhere(tiny_directory: Path, tmp_path: Path) -> None:
    make(tiny_directory, tmp_path / "out")
    endings = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert endings <= {".json", ".safetensors", ".md", ".jinja", ".txt", ""}


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def change_version(folder: Path) -> None:
    value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    value["format_version"] = 99
    (folder / MANIFEST).write_text(json.dumps(value), encoding="utf-8")


def break_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    (folder / MANIFEST).write_text(text[:-40], encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "does not match its checksum"),
        (truncate, "truncated"),
        (change_version, "version 99"),
        (break_manifest, "damaged"),
        (lambda folder: (folder / WEIGHTS).unlink(), "missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "not a softtrellis checkpoint"),
        (lambda folder: (folder / "config.json").unlink(), "missing"),
    ],
)
def test_damage_is_named(
    tiny_directory: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    make(tiny_directory, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        load_quantized(tmp_path / "out")


def edit(folder: Path, name: str) -> None:
    text = (folder / name).read_text(encoding="utf-8")
    (folder / name).write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "generation_config.json"])
def test_what_people_edit_is_not_compared(tiny_directory: Path, tmp_path: Path, name: str) -> None:
    make(tiny_directory, tmp_path / "new")
    assert name not in read_manifest(tmp_path / "new").files
    listing = json.loads((tmp_path / "new" / MANIFEST).read_text(encoding="utf-8"))["files"]
    assert name not in listing
    for version in (1, 2, 3):
        old = Path(__file__).parent / f"checkpoint_v{version}"
        shutil.copytree(old, tmp_path / f"v{version}")
    for folder in (tmp_path / "new", *(tmp_path / f"v{version}" for version in (1, 2, 3))):
        edit(folder, name)
        load_quantized(folder)
        files = [path for path in folder.iterdir() if path.is_file()]
        assert size_report(folder).file_bytes == sum(path.stat().st_size for path in files)
        (folder / name).unlink()
        load_quantized(folder)
        assert size_report(folder).file_bytes > 0


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_what_decides_the_numbers_is(tiny_directory: Path, tmp_path: Path, name: str) -> None:
    make(tiny_directory, tmp_path / "out")
    edit(tmp_path / "out", name)
    with pytest.raises(CheckpointError, match=f"{name} has .* truncated or altered"):
        load_quantized(tmp_path / "out")


def test_save_pretrained_over_a_checkpoint(tiny_directory: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import_module("softtrellis.integrations.transformers")
    make(tiny_directory, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="save_pretrained over a checkpoint does that"):
        load_quantized(tmp_path / "out")


def test_another_base_model_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    make(tiny_directory, tmp_path / "out")
    source = load_source(str(tiny_directory))
    manifest = read_manifest(tmp_path / "out")
    check_base(manifest, source.model)
    with torch.no_grad():
        source.model.get_input_embeddings().weight[0] += 1.0
    with pytest.raises(CheckpointError, match="another model"):
        check_base(manifest, source.model)


def test_outputs_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with whole_directory(output) as partial:
        (partial / "a").write_text("first", encoding="utf-8")
        assert not output.exists()
    with pytest.raises(OutputExists, match="--force"), whole_directory(output):
        pass
    with pytest.raises(RuntimeError), whole_directory(output, force=True) as partial:  # noqa: PT012
        (partial / "a").write_text("second", encoding="utf-8")
        raise RuntimeError
    assert (output / "a").read_text(encoding="utf-8") == "first"
    assert list(tmp_path.iterdir()) == [output]
    with whole_directory(output, force=True) as partial:
        (partial / "a").write_text("third", encoding="utf-8")
    assert (output / "a").read_text(encoding="utf-8") == "third"
    assert list(tmp_path.iterdir()) == [output]
