"""The commands one after the other, on a tiny model."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.support import LAYERS, QUANTIZE, SMALL, TRAIN, Command, Start, contents

from softtrellis.cli.main import build_parser
from softtrellis.cli.train import _kept
from softtrellis.io.checkpoint import load_quantized, read_manifest
from softtrellis.modules.replace import quantized_layers


def next_command(out: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith("Next: softtrellis ")]
    return shlex.split(line)[2:]


def test_quantize(softtrellis: Command, model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "with a space"
    result = softtrellis("quantize", model, "-o", output, "--data", text, *QUANTIZE)
    assert result.code == 0
    assert list(quantized_layers(load_quantized(output))) == LAYERS
    rows = [line.split() for line in result.out.splitlines() if line.startswith("model.")]
    assert [name for name, *_ in rows] == LAYERS
    assert all(0 < float(proxy) < float(error) < 1 for _, proxy, error, *_ in rows)
    assert "2 linear layers, 4,096 weights, 2.062 bits per weight" in result.err
    assert "on this machine: encoding" in result.err
    assert "quantize" in result.err
    assert "%|" not in result.out
    options = build_parser().parse_args(next_command(result.out))
    assert (options.checkpoint, options.teacher) == (str(output), str(model))
    assert [path.name for path in tmp_path.iterdir()] == ["with a space"]


def test_inspect(softtrellis: Command, checkpoint: Path) -> None:
    result = softtrellis("inspect", checkpoint)
    assert (result.code, result.err) == (0, "")
    assert "code         1mad, L=4 k=2 V=1" in result.out
    assert "(licence mit)" in result.out
    assert "checksums match" in result.out
    assert all(re.search(rf"{re.escape(name)} +32 x 64 +8 +2\n", result.out) for name in LAYERS)
    assert "code=1mad" in result.out
    found = re.search(
        r"([\d,]+) weights: codes ([\d.]+) .* signs ([\d.]+); all files ([\d,]+) bytes", result.out
    )
    assert found
    weights, codes, stored, size = (float(part.replace(",", "")) for part in found.groups())
    assert weights == 2 * 32 * 64
    assert codes == 2.0
    assert 2.0 < stored <= 2.1
    assert size == sum(map(len, contents(checkpoint).values()))
    assert "not compared" in softtrellis("inspect", checkpoint, "--no-verify").out


def test_training_starts_nearer_to_weights_that_have_moved(
    softtrellis: Command, model: Path, text: Path, checkpoint: Path, tmp_path: Path
) -> None:
    starts = []
    options = ["--teacher", model, "--data", text, "--ctx", "32", "--steps", "1", "--batch", "1"]
    given = checkpoint
    for name, more in (("first", []), ("second", []), ("third", ["--start", "0"])):
        result = softtrellis("train", given, *options, "-o", tmp_path / name, *more)
        assert result.code == 0, result.err
        given = tmp_path / name
        starts.append(read_manifest(given).provenance["train"]["start"])
    assert starts == [0.5, 0.25, 0.0]


def test_a_dry_run_writes_nothing(
    softtrellis: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    options = ["--data", text, *QUANTIZE, "--fine-tune", "--dry-run"]
    result = softtrellis("quantize", model, "-o", tmp_path / "out", *options)
    assert result.code == 0
    *names, weights, seconds, memory = result.out.splitlines()
    assert names == LAYERS
    assert weights.startswith("2 linear layers, 4,096 weights, 2.8")  # with scales of channels
    assert "tuning" in seconds
    assert "on the device" in memory
    assert not list(tmp_path.iterdir())


def test_fine_tuning_and_a_map_of_bits(
    softtrellis: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    options = ["--fine-tune", "--epochs", "1", "--bits-map", "v_proj=3,0=1", "--skip", "o_proj"]
    output = tmp_path / "out"
    assert (
        softtrellis("quantize", model, "-o", output, "--data", text, *QUANTIZE, *options).code == 0
    )
    layers = quantized_layers(load_quantized(tmp_path / "out"))
    assert [layer.layer.code.spec.k for layer in layers.values()] == [2, 3]
    assert all(layer.in_scale is not None for layer in layers.values())
    assert "k=3" in softtrellis("inspect", tmp_path / "out").out


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_bits(softtrellis: Command, model: Path, text: Path, tmp_path: Path, bits: int) -> None:
    options = ["--bits", bits, "--L", "6", "--layers", LAYERS[0], "--no-hessian"]
    options = [*SMALL, "--code", "mul1", *map(str, options)]
    assert softtrellis("quantize", model, "-o", tmp_path / "out", *options).code == 0
    out = softtrellis("inspect", tmp_path / "out").out
    assert f"codes {bits}.0000 bits per weight" in out


def test_training_that_only_harms(
    softtrellis: Command, train: Start, checkpoint: Path, tmp_path: Path
) -> None:
    result = softtrellis(*train(tmp_path / "out"), "--lr", "30")
    assert result.code == 0, result.err
    assert ", 0.00% of codes changed\n" in result.out
    kept = r"^kept the code it started from: no step was better on held-out text "
    found = re.search(
        kept + r"\(KL ([\d.]+) nats per token; the last step's ([\d.]+)\)$", result.out, re.M
    )
    assert found
    assert float(found[2]) > float(found[1])
    for name, layer in quantized_layers(load_quantized(checkpoint)).items():
        found = quantized_layers(load_quantized(tmp_path / "out"))[name]
        assert torch.equal(found.codes, layer.codes)
        assert torch.equal(found.weight(), layer.weight())


@pytest.mark.parametrize("option", ["--held-out", "--evaluate-every"])
def test_training_that_looks_at_no_held_out_text_says_so(
    softtrellis: Command, train: Start, tmp_path: Path, option: str
) -> None:
    result = softtrellis(*train(tmp_path / "out"), "--steps", "1", option, "0")
    assert result.code == 0, result.err
    unseen = "kept the last step's code, unseen: nothing was measured on held-out text\n"
    assert unseen in result.out


def test_a_text_too_short_to_hold_a_part_out(
    softtrellis: Command, model: Path, checkpoint: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("abcdefgh " * 20, "utf-8")
    command = ["train", checkpoint, "--teacher", model, "-o", tmp_path / "out", "--data", short]
    result = softtrellis(*command, *TRAIN)
    assert result.code == 1
    part = "Of the part that is held out (--held-out 0 holds out none): The text has 10 tokens"
    assert result.error.startswith(part)
    assert softtrellis(*command, *TRAIN, "--steps", "1", "--held-out", "0").code == 0


@pytest.mark.parametrize("end", [["--steps", "2"], ["--minutes", "0.01"]])
def test_a_warning_has_a_line_of_its_own(
    softtrellis: Command, train: Start, tmp_path: Path, end: list[str]
) -> None:
    options = ["--lr", "1e-5", "--save-every", "0", *end]
    result = softtrellis(*train(tmp_path / "out"), *options)
    assert result.code == 0, result.err
    (warning,) = [line for line in result.err.splitlines() if "change a code" in line]
    assert warning.startswith("warning: ")
    assert "train:" not in warning
    assert softtrellis(*train(tmp_path / "out"), "--force").err.count("warning: ") == 0


def test_the_kept_step_and_the_last_one() -> None:
    records = [{"heldout_kl_hard": 0.5}, {}, {"heldout_kl_hard": 0.6}]
    kept = "kept the code of step 1, held-out KL 0.5000 nats per token; the last step's 0.6000"
    assert _kept((0, 0.5), records) == kept
    records[-1] = {"heldout_kl_hard": math.nan}
    assert _kept(None, records).endswith("unseen: no KL was a finite number on held-out text")


def test_train(softtrellis: Command, checkpoint: Path, trained: Path, shelf: Path) -> None:
    out, err = json.loads((shelf / "train.json").read_text(encoding="utf-8"))
    found = re.search(
        r"^4 steps in \d+ s: loss [\d.]+ to [\d.]+, ([\d.]+)% of codes changed$", out, re.M
    )
    assert found
    assert float(found[1]) > 0
    assert re.search(r"^kept the code of step 4, held-out KL [\d.]+ nats per token$", out, re.M)
    assert "train: " in err
    assert "%|" not in out
    lines = (trained / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    assert not [name for name in contents(trained) if name.startswith("train_")]
    before, after = load_quantized(checkpoint), load_quantized(trained)
    for name in LAYERS:
        codes = [quantized_layers(each)[name].codes for each in (before, after)]
        assert not torch.equal(*codes)
    assert build_parser().parse_args(next_command(out)).models[1:] == [
        str(checkpoint),
        str(trained),
    ]
    out = softtrellis("inspect", trained).out
    assert "quantize: " in out
    assert "train: " in out


def test_eval_and_report(
    softtrellis: Command, model: Path, checkpoint: Path, trained: Path, text: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    sizes = softtrellis("inspect", run).out
    models = [str(path) for path in (model, checkpoint, run)]
    options = ["--data", text, "--ctx", "32", "--windows", "4", "--json", run / "results.json"]
    result = softtrellis("eval", *models, *options)
    assert result.code == 0
    assert "evaluate" in result.err
    heading, _, *rows = result.out.splitlines()[:5]
    assert heading.split()[0] == "model"
    assert [row.split()[0] for row in rows] == models
    perplexity, kl, bits, size = zip(*(row.split()[1:] for row in rows), strict=True)
    assert all(1 < float(value) < 1000 for value in perplexity)
    assert float(kl[0]) == 0 < min(float(kl[1]), float(kl[2]))
    assert bits[0] == "32.000"
    assert f"all files {size[2]} bytes" in sizes
    assert f"{run} " in result.out
    assert "95% interval" in result.out
    assert "on this text" in result.out
    assert "held-out" not in result.out
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in results["rows"]] == models
    assert len(results["windows"][models[1]]["kl"]) == 4

    result = softtrellis("report", run)
    assert (result.code, result.out, result.err) == (0, f"{run / 'report.html'}\n", "")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert models[1] in page
    assert (run / "main.png").read_bytes().startswith(b"\x89PNG")
    assert softtrellis("inspect", run).out == sizes, "a report is no part of the checkpoint"

    other = shutil.copytree(run, tmp_path / "other")
    output = tmp_path / "comparison.html"
    result = softtrellis("report", run, other, "-o", output)
    assert (result.code, result.out, result.err) == (0, f"{output}\n", "")
    page = output.read_text(encoding="utf-8")
    assert "other is not shown to beat run" in page
    assert "the runs were made with the same settings" in page
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_quickstart_knows_that_its_text_is_held_out(
    softtrellis: Command, model: Path, text: Path, tmp_path: Path
) -> None:
    long = tmp_path / "long.txt"
    long.write_text(5 * text.read_text("utf-8").replace(" ", "\n"), "utf-8")
    command = ["quickstart", "--model", model, "-o", tmp_path / "run", "--data", long]
    result = softtrellis(*command, "--layers", "1.self_attn.v_proj", "--steps", "1", "--short")
    assert result.code == 0, result.err
    assert "on held-out text" in result.out
    assert "on this text" not in result.out
    assert "on held-out text" in (tmp_path / "run/report.html").read_text("utf-8")


def test_eval_of_one_window(
    softtrellis: Command, model: Path, checkpoint: Path, text: Path
) -> None:
    options = ["--data", text, "--ctx", "32", "--windows", "1"]
    result = softtrellis("eval", model, checkpoint, *options)
    assert result.code == 0
    assert "too few to compare" in result.out
    result = softtrellis("eval", model, *options)
    assert result.code == 0
    assert "too few" not in result.out


def test_a_full_standard_output() -> None:
    command = [sys.executable, "-m", "softtrellis", "env"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("softtrellis: error: the disk is full")
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(softtrellis: Command, tmp_path: Path) -> None:
    result = softtrellis("inspect", tmp_path, "--debug")
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err
    assert result.err.splitlines()[-1].startswith("softtrellis: error: ")


def test_texts_of_all_kinds(
    softtrellis: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chat = {"messages": [{"role": "user", "content": "Five letters, please. " * 20}]}
    chats, articles = tmp_path / "chats.jsonl", tmp_path / "articles.txt"
    chats.write_text(json.dumps(chat), encoding="utf-8")
    articles.write_text("One of them.\n\nAnd another. " * 20, encoding="utf-8")
    texts = [str(chats), f"documents:{articles}", "teacher"]
    weights = []
    for number, source in enumerate(texts):
        output = tmp_path / str(number)
        result = softtrellis("quantize", model, "-o", output, "--data", source, *QUANTIZE)
        assert result.code == 0, result.err
        weights.append(quantized_layers(load_quantized(output))[LAYERS[0]].weight())
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    scored = ["--ctx", "32", "--data", *texts[:2]]
    assert "30/30" in softtrellis("eval", model, tmp_path / "0", *scored).err
    refused = softtrellis("eval", model, "--data", "teacher")
    assert "'teacher' is sampled from the model" in refused.error
    mixed = softtrellis("quantize", model, "-o", tmp_path / "x", "--data", *texts, *QUANTIZE)
    assert "'teacher' cannot be mixed with other text" in mixed.error
    assert mixed.code == 2
