"""Training and quantization by several processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks_worker
import torch
from ranks_worker import STEPS, codes, run_jobs
from safetensors.torch import load_file

from softtrellis.io.checkpoint import base_of, load_quantized, save_quantized
from softtrellis.io.sources import load_source
from softtrellis.recipes.finetune import FineTuneConfig
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.qat import DistillConfig, distill
from softtrellis.recipes.ranks import Ranks

EVERYTHING = ["latents", "scales", "norms", "table"]
ALL = {"train": EVERYTHING, "batch": 4, "micro_batch": 1}
HALF = {"steps": 8, "batch": 3, "start": 0.5, "clip": 0.05, "t_init": "auto", "save_every": 4}
HALF |= {"estimator": "straight_through", "reencode_every": 3}
STOPPED = HALF | {"stop_after": 6}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def folder(shelf: Path, request: pytest.FixtureRequest) -> Path:
    """A text, a teacher, its quantized student, and what jobs on this process gave."""
    if (shelf / "student").exists():
        return shelf
    text = "".join(random.Random(0).choices("abcdefgh ", k=4000))
    (shelf / "text.txt").write_text(text, encoding="utf-8")
    shutil.move(request.getfixturevalue("tiny_directory"), shelf / "teacher")
    source = load_source(str(shelf / "teacher"))
    base = base_of(source)
    config = QuantizeConfig(
        L=10,
        inputs="quantized",
        ctx=32,
        windows=8,
        layers=("1.self_attn.q_proj", "1.self_attn.k_proj", "1.mlp.up_proj"),
        data=(str(shelf / "text.txt"),),
    )
    student = quantize_model(source.model, config, tokenizer=source.tokenizer)
    (shelf / "student").mkdir()
    save_quantized(student, source.tokenizer, shelf / "student", base=base)
    run_jobs(shelf, {"all-1": ("train", ALL), "half-1": ("train", HALF)})
    return shelf


def torchrun(folder: Path, ranks: int, jobs: dict[str, Any]) -> None:
    """Runs jobs on so many processes, once for all tests."""
    if all((folder / f"{name}.json").exists() for name in jobs.keys() - {"commands", "device"}):
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(ranks), ranks_worker.__file__, str(folder), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    told = [line for line in done.stderr.splitlines() if line.startswith(("[rank", "softtrellis"))]
    assert done.returncode == 0, "\n".join(told[-60:])


def commands(folder: Path, output: str) -> list[str]:
    """``softtrellis train`` of three steps."""
    text, student, teacher = (str(folder / name) for name in ("text.txt", "student", "teacher"))
    options = ["train", student, "--teacher", teacher, "-o", str(folder / output), "--data", text]
    return [*options, "--steps", "3", "--ctx", "32", "--windows", "8", "--held-out", "0"]


@pytest.fixture
def two(folder: Path) -> Path:
    """What two ranks gave: a whole run, an interrupted one, and a quantization."""
    jobs = {
        "all-2": ("train", ALL),
        "half-2": ("train", STOPPED | {"directory": "saved"}),
        "ptq-2": ("quantize", {}),
        "commands": [commands(folder, "by-two")],
    }
    (folder / "saved").mkdir(exist_ok=True)
    torchrun(folder, 2, jobs)
    return folder


@pytest.fixture
def three(two: Path) -> Path:
    """What three ranks gave, with windows that do not share evenly."""
    if not (two / "saved-3").exists():
        shutil.copytree(two / "saved", two / "saved-3")
    jobs = {
        "all-3": ("train", ALL),
        "half-3": ("train", HALF | {"directory": "saved-3", "resume": True}),
    }
    torchrun(two, 3, jobs)
    return two


def history(folder: Path, job: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"{job}.json").read_text(encoding="utf-8"))
    return found


def check_alike(folder: Path, job: str, other: str, *, losses: float = 1e-4) -> None:
    """The same losses, measurements and evaluations, and nearly the same codes."""
    a, b = history(folder, job), history(folder, other)
    assert len(a) == len(b) == (STEPS if job.startswith("all") else HALF["steps"])
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - {"seconds", "layers"}:
            tolerance = losses if key in ("loss", "heldout_kl", "temperature") else 2e-2
            assert x[key] == pytest.approx(y[key], rel=tolerance, abs=1e-6), key
        assert x.get("layers", {}).keys() == y.get("layers", {}).keys()
    first, second = (load_file(folder / f"{name}.safetensors") for name in (job, other))
    same = [float((first[name] == second[name]).float().mean()) for name in first]
    assert min(same) > 0.98


def test_two_ranks_give_the_losses_of_one(two: Path) -> None:
    check_alike(two, "all-1", "all-2")


def test_three_ranks_give_the_losses_of_one(three: Path) -> None:
    check_alike(three, "all-1", "all-3")


def test_a_run_saved_on_two_ranks_goes_on_on_three(three: Path) -> None:
    check_alike(three, "half-1", "half-3")


def test_a_run_saved_on_two_ranks_goes_on_on_one(two: Path) -> None:
    shutil.copytree(two / "saved", two / "saved-1")
    job = HALF | {"directory": "saved-1", "resume": True}
    run_jobs(two, {"half-21": ("train", job)})
    check_alike(two, "half-1", "half-21")


def test_the_saved_state_is_that_of_one_process(two: Path) -> None:
    (two / "saved-of-one").mkdir()
    job = STOPPED | {"directory": "saved-of-one"}
    run_jobs(two, {"half-of-one": ("train", job)})
    name = "train_state.safetensors"
    one, both = load_file(two / "saved-of-one" / name), load_file(two / "saved" / name)
    assert one.keys() == both.keys()
    for key, tensor in one.items():
        assert tensor.shape == both[key].shape
        assert tensor.dtype == both[key].dtype
        if key.endswith(".latent"):
            torch.testing.assert_close(both[key], tensor, atol=1e-3, rtol=0)


def check_quantized_alike(folder: Path, job: str, other: str) -> None:
    one, both = (load_file(folder / f"{name}.safetensors") for name in (job, other))
    assert history(folder, job) == pytest.approx(history(folder, other), rel=0.02)
    assert one.keys() == both.keys()
    # The sums of Hessians differ in their last bits, which LDLQ carries on once a code differs.
    same = {name: float((one[name] == both[name]).float().mean()) for name in one}
    assert same[next(iter(same))] > 0.98
    assert statistics.mean(same.values()) > 0.9


def test_two_ranks_quantize_as_one(two: Path) -> None:
    run_jobs(two, {"ptq-1": ("quantize", {})})
    check_quantized_alike(two, "ptq-1", "ptq-2")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_what_one_gives(folder: Path) -> None:
    gpu = {"device": "cuda"}
    jobs = {"train": ("train", ALL | gpu), "ptq": ("quantize", gpu)}
    run_jobs(folder, {f"all-{name}-gpu-1": job for name, job in jobs.items()})
    torchrun(folder, 2, {f"all-{name}-gpu-2": job for name, job in jobs.items()} | gpu)
    check_alike(folder, "all-train-gpu-1", "all-train-gpu-2", losses=1e-2)  # in bfloat16
    check_quantized_alike(folder, "all-ptq-gpu-1", "all-ptq-gpu-2")


class Two(Ranks):
    """Two ranks that have nothing to say to each other."""

    size = 2  # type: ignore[assignment]


def test_eight_bit_moments_are_refused() -> None:
    config = DistillConfig(optimizer="adamw8bit")
    with pytest.raises(ValueError, match="one rank only; use adamw"):
        distill("student", config, teacher="teacher", ranks=Two())


@pytest.mark.parametrize(
    ("windows", "tuning", "message"),
    [(8, FineTuneConfig(), "tuned on one rank only"), (1, None, "windows must be at least")],
)
def test_quantizing_what_ranks_cannot_share_is_refused(
    windows: int, tuning: FineTuneConfig | None, message: str
) -> None:
    config = QuantizeConfig(windows=windows)
    with pytest.raises(ValueError, match=message):
        quantize_model("teacher", config, fine_tune=tuning, ranks=Two())


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_parts_are_whole_and_even(ranks: int, count: int) -> None:
    class Numbered(Ranks):
        size = ranks  # type: ignore[assignment]
        rank = 0  # type: ignore[assignment]

    parts = []
    for number in range(ranks):
        Numbered.rank = number  # type: ignore[assignment]
        parts.append(list(range(count))[Numbered().part(count)])
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) == Numbered().most(count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_command_under_torchrun_writes_what_it_writes_alone(two: Path) -> None:
    assert not list(two.glob("by-two.partial*"))
    found = load_quantized(two / "by-two")
    expected = load_quantized(two / "student")
    assert codes(found).keys() == codes(expected).keys()
    lines = (two / "by-two" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert not list((two / "by-two").glob("*_state*"))
