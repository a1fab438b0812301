"""Models, checkpoints and texts that cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.support import LAYERS, QUANTIZE, TRAIN, Command, Refused, contents

from softtrellis.io.checkpoint import MANIFEST, WEIGHTS

Change = Callable[[dict[str, torch.Tensor]], None]


def altered(model: Path, output: Path, change: Change) -> Path:
    """A copy of a model with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, output)
    tensors = load_file(output / "model.safetensors")
    change(tensors)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


# Layers


@pytest.mark.parametrize("name", ["7", "3-9", "mlp.sideways_proj", "*.attention.*", "lm_head"])
def test_unknown_layers(
    softtrellis: Command, model: Path, checkpoint: Path, text: Path, tmp_path: Path, name: str
) -> None:
    commands = [
        ["quantize", model, *QUANTIZE],
        ["train", checkpoint, "--teacher", model, *TRAIN],
    ]
    for command in commands:
        options = ["-o", tmp_path / "out", "--data", text, "--layers", f"1,{name}"]
        result = softtrellis(*command, *options)
        assert result.error.startswith(f"no linear layer matches {name!r}")
        assert "layers 0 to 1" in result.error
        assert "model.layers.0.self_attn.q_proj" in result.error
        assert (result.code, result.out) == (2, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits-map", "down_proj"], "name layers and bits as down_proj=3, got 'down_proj'"),
        (["--bits-map", "down_proj=7"], "--bits-map must give 1 to 4 bits, got 7 for 'down_proj'"),
        (["--bits-map", "sideways=3"], "no linear layer matches 'sideways'"),
        (["--skip", "sideways"], "no linear layer matches 'sideways'"),
        (["--skip", "1"], "skip leaves no layer to quantize"),
        (["--epochs", "3"], "--epochs needs --fine-tune"),
        (["--fine-tune", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--end-to-end", "0"], "--end-to-end must be at least 1, got 0"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
    ],
)
def test_quantizing_options_that_make_no_sense(
    softtrellis: Command, model: Path, text: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    command = ["quantize", model, "-o", tmp_path / "out", "--data", text, *QUANTIZE, "--L", "6"]
    result = softtrellis(*command, *options)
    assert message in result.error
    assert result.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_a_gpu_that_is_not_there(
    refused: Refused, model: Path, text: Path, tmp_path: Path, command: str
) -> None:
    options = ["-o", tmp_path / "out"] if command == "quantize" else []
    message = refused(command, model, "--data", text, *options, "--device", "cuda", code=2)
    assert message == "--device must be cpu: torch finds no CUDA device here"


def test_training_layers_that_are_not_quantized(
    refused: Refused, model: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    message = refused(
        *("train", checkpoint, "--teacher", model, "-o", tmp_path / "out", "--data", text),
        *(*TRAIN, "--layers", "1.mlp.up_proj"),
        code=1,
    )
    assert "model.layers.1.mlp.up_proj is not quantized" in message


def test_temperatures_that_float32_cannot_take(
    softtrellis: Command, model: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    command = ["train", checkpoint, "--teacher", model, "-o", tmp_path / "out", "--data", text]
    result = softtrellis(*command, *TRAIN, "--t-min", "0.001")
    assert result.code == 1
    assert "temperatures of this code must lie between 0.005 and 1e+06" in result.error
    assert "t_min=0.001" in result.error
    assert not list(tmp_path.iterdir()), "refused before the first step"


# Weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(
    refused: Refused, model: Path, text: Path, tmp_path: Path, name: str, value: float
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = value

    broken = altered(model, tmp_path / "broken", spoil)
    message = refused("quantize", broken, "-o", tmp_path / "out", "--data", text, *QUANTIZE, code=1)
    assert message.startswith(f"{name} holds NaN or infinity; ")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_teacher_that_is_not_finite(
    refused: Refused, model: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan

    broken = altered(model, tmp_path / "broken", spoil)
    command = ["train", checkpoint, "--teacher", broken, "-o", tmp_path / "out"]
    message = refused(*command, "--data", text, *TRAIN, code=1)
    assert message.startswith("model.layers.0.mlp.up_proj.weight holds NaN")


def test_eval_of_weights_that_are_not_finite(
    softtrellis: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][0] = torch.nan

    broken = altered(model, tmp_path / "broken", spoil)
    result = softtrellis("eval", model, broken, "--data", text, "--ctx", "32", "--windows", "2")
    assert f"'{broken}' hold NaN or infinity" in result.error
    assert (result.code, result.out) == (1, "")


# Checkpoints


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def flip_a_byte(name: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return flip


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / MANIFEST, change)


def write_manifest(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / MANIFEST).write_text(text, encoding="utf-8") and None


DAMAGE = {
    "truncated": (truncate, WEIGHTS, "truncated"),
    "weights altered": (flip_a_byte(WEIGHTS), WEIGHTS, "does not match its checksum"),
    "tokenizer altered": (flip_a_byte("tokenizer.json"), "tokenizer.json", "checksum"),
    "weights missing": (remove(WEIGHTS), WEIGHTS, "is missing"),
    "configuration missing": (remove("config.json"), "config.json", "is missing"),
    "manifest missing": (remove(MANIFEST), "", "'softtrellis quantize'"),
    "manifest empty": (write_manifest(""), MANIFEST, "is damaged"),
    "manifest cut off": (write_manifest('{"format": "softtrellis", "form'), MANIFEST, "damaged"),
    "manifest of another kind": (write_manifest("[1, 2]"), MANIFEST, "is damaged"),
    "another format": (manifest(lambda m: m.update(format="zip")), MANIFEST, "format 'zip'"),
    "another version": (manifest(lambda m: m.update(format_version=99)), "", "version 99"),
    "no code": (manifest(lambda m: m.pop("codes")), MANIFEST, "KeyError: 'codes'"),
    "unknown code": (
        manifest(lambda m: m["codes"][0].update(name="zip")),
        MANIFEST,
        "unknown code",
    ),
    "no layers": (manifest(lambda m: m["layers"].clear()), MANIFEST, "no layer"),
    "no files": (manifest(lambda m: m["files"].clear()), MANIFEST, "is damaged"),
    "files not sizes": (manifest(lambda m: m["files"].update(a=3)), MANIFEST, "is damaged"),
    "words for numbers": (
        manifest(lambda m: m["layers"][LAYERS[0]].update(in_features="many")),
        MANIFEST,
        "is damaged",
    ),
}
MISMATCH = {
    "another shape": lambda m: m["layers"][LAYERS[0]].update(in_features=128),
    "another layer": lambda m: m["layers"].update(elsewhere=m["layers"].pop(LAYERS[0])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints(
    refused: Refused, damaged: Path, model: Path, text: Path, tmp_path: Path, damage: str
) -> None:
    spoil, name, reason = DAMAGE[damage]
    spoil(damaged)
    options = ["--data", text, "--ctx", "32"]
    for command in (
        ["inspect", damaged],
        ["train", damaged, "--teacher", model, "-o", tmp_path / "out", *options],
        ["eval", model, damaged, *options],
    ):
        if command[0] == "eval" and damage == "manifest missing":
            continue  # then it is taken for a full-precision model
        message = refused(*command, code=1)
        assert str(damaged / name) in message
        assert reason in message
        assert "copy the checkpoint again" in message or ";" in message or "format" in message
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("change", MISMATCH.values(), ids=MISMATCH.keys())
def test_manifests_of_other_tensors(
    refused: Refused, damaged: Path, model: Path, text: Path, change: Callable[[Any], None]
) -> None:
    rewrite(damaged / MANIFEST, change)
    message = refused("eval", model, damaged, "--data", text, "--ctx", "32", code=1)
    assert f"{damaged / MANIFEST} does not fit the tensors" in message


@pytest.mark.parametrize("place", ["nowhere", "model", "file"])
def test_what_is_no_checkpoint(
    refused: Refused, model: Path, text: Path, tmp_path: Path, place: str
) -> None:
    path = {"nowhere": tmp_path / "nowhere", "model": model, "file": text}[place]
    for command in (["inspect", path], ["train", path, "--teacher", model, "-o", tmp_path / "out"]):
        message = refused(*command, code=1)
        assert message.startswith(f"{path} is not a softtrellis checkpoint")
        assert "'softtrellis quantize'" in message
    assert not list(tmp_path.iterdir())


def test_another_base_model(
    refused: Refused, model: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] += 0.5

    other = altered(model, tmp_path / "other", change)
    command = ["train", checkpoint, "--teacher", other, "-o", tmp_path / "out", "--data", text]
    message = refused(*command, *TRAIN, code=1)
    assert f"was made from {model.name}, " in message
    assert "another model; give the one it was made from" in message
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_checkpoints_in_the_place_of_models(
    refused: Refused, model: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    for command in (
        ["quantize", checkpoint, "-o", tmp_path / "out", "--data", text, *QUANTIZE],
        ["train", checkpoint, "--teacher", checkpoint, "-o", tmp_path / "out", "--data", text],
    ):
        if command[0] == "train":
            command[3] = shutil.copytree(checkpoint, tmp_path / "copy")
        before = contents(tmp_path)
        message = refused(*command, code=1)
        assert "is a softtrellis checkpoint; give the full-precision model" in message
        assert f"({model.name})" in message
        assert contents(tmp_path) == before


# Models


@pytest.mark.parametrize("name", ["no/such/model", "no/such/place/at/all", "nothing.gguf"])
def test_unknown_models(
    refused: Refused, checkpoint: Path, text: Path, tmp_path: Path, name: str
) -> None:
    for command in (
        ["quantize", name, "-o", tmp_path / "out"],
        ["train", checkpoint, "--teacher", name, "-o", tmp_path / "out"],
        ["eval", name],
    ):
        message = refused(*command, "--data", text, code=1)
        assert f"'{name}'" in message
        assert "smollm2-135m-instruct" in message
    assert not list(tmp_path.iterdir())


def test_models_of_different_vocabularies(
    softtrellis: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = torch.cat([table, table[:8]])

    wide = altered(model, tmp_path / "wide", widen)
    rewrite(wide / "config.json", lambda config: config.update(vocab_size=136))
    result = softtrellis("eval", model, wide, "--data", text, "--ctx", "32", "--windows", "2")
    assert f"'{wide}' has a vocabulary of 136, the reference one of 128" in result.error
    assert (result.code, result.out) == (1, "")


# Texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No text at '{}': give pydoc, wikitext2, hf:NAME or the path of a UTF-8"),
        (b"", "'{}' is empty"),
        (b" \n\n ", "'{}' is empty"),
        (b"ol\xe9", "'{}' is not UTF-8 (byte 0xe9 at position 2)"),
        (b"short", "The text has 5 tokens, less than one window of 32: give more text"),
    ],
    ids=["missing", "empty", "blank", "latin-1", "short"],
)
def test_texts(
    refused: Refused,
    model: Path,
    checkpoint: Path,
    tmp_path: Path,
    content: bytes | None,
    message: str,
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    before = contents(tmp_path)
    for command in (
        ["quantize", model, "-o", tmp_path / "out", *QUANTIZE],
        ["train", checkpoint, "--teacher", model, "-o", tmp_path / "out", *TRAIN],
        ["eval", model, "--ctx", "32"],
    ):
        expected = message.format(path)
        if command[0] == "train" and content == b"short":
            expected = "Of the part that is trained on: The text has 4 tokens, less than"
        assert refused(*command, "--data", path, code=1).startswith(expected)
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_quickstart_fails_like_its_parts(
    softtrellis: Command, model: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    for options, message, code in (
        (["--model", checkpoint], "is a softtrellis checkpoint", 1),
        (["--model", model, "--layers", "7"], "no linear layer matches '7'", 2),
        (["--model", model, "--layers", "1", "--data", tmp_path / "short.txt"], "5 tokens", 1),
    ):
        result = softtrellis("quickstart", "-o", tmp_path / "out", *options)
        assert message in result.error
        assert result.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_a_directory_as_text(refused: Refused, model: Path, tmp_path: Path) -> None:
    message = refused("eval", model, "--data", tmp_path, code=1)
    assert message.startswith(f"'{tmp_path}' is a directory")


# Runs


def test_report_without_a_run(refused: Refused, tmp_path: Path) -> None:
    message = refused("report", tmp_path, code=1)
    assert message.startswith(
        f"{tmp_path} has neither log.jsonl nor results.json; give the directory"
    )
    message = refused("report", tmp_path / "nowhere", code=1)
    assert message.startswith(f"{tmp_path / 'nowhere'} has neither")


def test_report_on_a_damaged_run(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 0}\nnonsense\n', encoding="utf-8")
    assert f"{tmp_path / 'log.jsonl'}, line 2 is not JSON" in refused("report", tmp_path, code=1)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "results.json").write_text("[]", encoding="utf-8")
    message = refused("report", tmp_path, code=1)
    assert message.startswith(f"{tmp_path / 'results.json'} does not hold")
