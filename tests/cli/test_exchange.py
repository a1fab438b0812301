"""Export and import as commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli.support import LAYERS, Command, Refused, contents
from exl3_decoder import decode, read_tensors
from transformers import AutoConfig

from softtrellis.io.checkpoint import WEIGHTS, load_quantized, read_manifest
from softtrellis.modules.replace import quantized_layers


@pytest.fixture
def exl3(shelf: Path, model: Path, text: Path, softtrellis: Command) -> Path:
    """Two layers of `model` in EXL3's profile, the others as they were."""
    path = shelf / "exl3"
    if not path.exists():
        options = ["--profile", "exl3", "--bits", "3", "--layers", ",".join(LAYERS)]
        result = softtrellis("quantize", model, "-o", path, "--no-hessian", *options)
        assert result.code == 0, result.err
    return path


@pytest.fixture
def exported(shelf: Path, exl3: Path, softtrellis: Command) -> Path:
    path = shelf / "exported"
    if not path.exists():
        result = softtrellis("export", exl3, "--format", "exl3", "--partial", "-o", path)
        assert result.code == 0, result.err
        first, second, third, last = result.out.splitlines()
        assert first == "EXL3, 2 layers of 4,096 weights: trellis 24.0000 bits per weight"
        assert second == "2 of them padded to multiples of 128, which is counted"
        assert third.startswith("12 linear layers in float16: model.layers.0.self_attn.q_proj, ")
        assert last == str(path)
    return path


def test_there_and_back(
    softtrellis: Command, model: Path, exl3: Path, exported: Path, tmp_path: Path
) -> None:
    result = softtrellis("import", exported, "-o", tmp_path / "back", "--base", model)
    assert result.code == 0, result.err
    assert "2 layers with the same bits\ncorrelation with the base model at least 0.9" in result.out
    expected = quantized_layers(load_quantized(exl3))
    found = quantized_layers(load_quantized(tmp_path / "back"))
    assert list(found) == LAYERS
    for name, layer in expected.items():
        assert torch.equal(found[name].codes, layer.codes)
        assert torch.equal(found[name].weight(), layer.weight())
    assert AutoConfig.from_pretrained(exported).dtype == torch.float16
    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == torch.float32, "of the base model"
    ours, theirs = read_manifest(tmp_path / "back"), read_manifest(exl3)
    assert ours.base.fingerprint == theirs.base.fingerprint
    assert ours.layers == theirs.layers


def test_an_imported_model_can_be_trained(
    softtrellis: Command, model: Path, exported: Path, text: Path, tmp_path: Path
) -> None:
    softtrellis("import", exported, "-o", tmp_path / "back")
    options = ["--ctx", "32", "--windows", "2", "--batch", "2", "--steps", "1", "--warmup", "0"]
    options += ["--estimator", "identity", "--measure-every", "0", "--reencode-every", "0"]
    command = ["train", tmp_path / "back", "--teacher", model, "--data", text, *options]
    result = softtrellis(*command, "-o", tmp_path / "trained")
    assert result.code == 0, result.err


def test_an_independent_decoder_reads_what_was_trained(
    softtrellis: Command, model: Path, exl3: Path, text: Path, tmp_path: Path
) -> None:
    trained, output = tmp_path / "trained", tmp_path / "exl3"
    options = ["--ctx", "32", "--windows", "4", "--batch", "2", "--steps", "2", "--warmup", "0"]
    options += ["--estimator", "identity", "--lr", "0.2", "--evaluate-every", "0"]
    command = ["train", exl3, "--teacher", model, "--data", text, *options, "-o", trained]
    result = softtrellis(*command)
    assert result.code == 0, result.err
    result = softtrellis("export", trained, "--format", "exl3", "--partial", "-o", output)
    assert result.code == 0, result.err
    before, after = (quantized_layers(load_quantized(path)) for path in (exl3, trained))
    tensors = read_tensors(output / WEIGHTS)
    for name in LAYERS:
        weight = after[name].weight()
        assert not torch.equal(after[name].codes, before[name].codes), "nothing was trained"
        found = torch.from_numpy(decode(tensors, name).T[: weight.shape[0], : weight.shape[1]])
        torch.testing.assert_close(
            found, weight.double(), rtol=0, atol=1e-5 * float(weight.abs().max())
        )


def test_a_dense_model_is_one_for_transformers(
    softtrellis: Command, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "dense"
    result = softtrellis("export", checkpoint, "--format", "dense", "-o", output)
    assert result.code == 0, result.err
    assert result.out.startswith("dense weights in bfloat16, ")
    found = AutoModelForCausalLM.from_pretrained(output)
    assert found.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(output).chat_template is not None
    expected = quantized_layers(load_quantized(checkpoint))
    for name, layer in expected.items():
        weight = found.get_parameter(f"{name}.weight")
        assert torch.equal(weight, layer.weight().bfloat16())


def test_other_profiles_are_refused(refused: Refused, checkpoint: Path, tmp_path: Path) -> None:
    options = ["--format", "exl3", "-o", tmp_path / "out"]
    message = refused("export", checkpoint, *options, code=1)
    assert message.startswith(f"{LAYERS[0]} cannot be written as EXL3: its code is 1mad")
    assert "quantize --profile exl3" in message
    assert not list(tmp_path.iterdir())


def test_layers_that_are_not_quantized(refused: Refused, exl3: Path, tmp_path: Path) -> None:
    message = refused("export", exl3, "--format", "exl3", "-o", tmp_path / "out", code=1)
    assert message.startswith("12 linear layers are not quantized, model.layers.0.self_attn.q_proj")
    assert "--partial" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "exl3", "--dtype", "float16"], "--dtype needs --format dense"),
        (["--format", "dense", "--partial"], "--partial needs --format exl3"),
        (["--format", "gguf"], "--format: invalid choice"),
        (["--format", "dense", "--dtype", "int8"], "--dtype: invalid choice"),
        ([], "required: --format"),
    ],
)
def test_options_that_make_no_sense(
    refused: Refused, checkpoint: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in refused("export", checkpoint, "-o", tmp_path / "out", *options, code=2)


def test_outputs_that_exist(refused: Refused, exl3: Path, exported: Path) -> None:
    before = contents(exported)
    assert "--force" in refused("export", exl3, "--format", "dense", "-o", exported, code=2)
    assert "--force" in refused("import", exported, "-o", exl3, code=2)
    assert "also the input" in refused("import", exported, "-o", exported, "--force", code=2)
    assert "also the input" in refused(
        *("export", exl3, "--format", "exl3", "-o", exl3, "--force"), code=2
    )
    assert contents(exported) == before


def test_what_cannot_be_imported(
    refused: Refused, model: Path, checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    output = ["-o", tmp_path / "out"]
    assert "is not quantized" in refused("import", model, *output, code=1)
    assert "softtrellis checkpoint already" in refused("import", checkpoint, *output, code=1)
    assert "is no directory" in refused("import", tmp_path / "nothing", *output, code=1)
    other = shutil.copytree(model, tmp_path / "other")
    for key, message in (
        ({"quip_params": {"codebook": "bitshift"}}, "name the full-precision model with --base"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with 'gptq'"),
    ):
        config = json.loads((model / "config.json").read_text("utf-8")) | key
        (other / "config.json").write_text(json.dumps(config), "utf-8")
        assert message in refused("import", other, *output, code=1)


def test_another_base_model_is_noticed(
    refused: Refused, model: Path, exported: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(model, tmp_path / "other")
    tensors = {name: torch.randn_like(t) for name, t in load_file(model / WEIGHTS).items()}
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    message = refused("import", exported, "-o", tmp_path / "out", "--base", other, code=1)
    assert "give the model that it was made from" in message
    assert list(tmp_path.iterdir()) == [other]


def test_commands_say_what_a_directory_holds(
    refused: Refused, model: Path, checkpoint: Path, exported: Path, text: Path, tmp_path: Path
) -> None:
    from softtrellis.io.manifest import MANIFEST

    saved = shutil.copytree(checkpoint, tmp_path / "saved")
    (saved / MANIFEST).unlink()  # as save_pretrained leaves it
    output = ["-o", tmp_path / "out"]
    dense = ["export", "--format", "dense", *output]
    assert "there is no such directory" in refused(*dense, tmp_path / "nothing", code=1)
    assert "save_pretrained does not write" in refused(*dense, saved, code=1)
    assert "'softtrellis import'" in refused(*dense, exported, code=1)
    for command, options in (("generate", ["--prompt", "a"]), ("eval", ["--data", text])):
        assert "'softtrellis import'" in refused(command, exported, *options, code=1)
    for other in (saved, exported):
        message = refused("quantize", other, "--data", text, *output, code=1)
        assert "is quantized" in message
        assert "full-precision model" in message
    assert list(tmp_path.iterdir()) == [saved]
