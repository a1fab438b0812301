"""Training and quantization by several processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks_worker
import torch
from ranks_worker import STEPS, codes, run_jobs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from softtrellis.io.checkpoint import base_of, load_quantized, save_quantized
from softtrellis.io.files import STATE
from softtrellis.io.sources import load_source
from softtrellis.recipes.finetune import FineTuneConfig
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.qat import DistillConfig, distill
from softtrellis.recipes.ranks import Ranks

EVERYTHING = ["latents", "scales", "norms", "table"]
ALL = {"train": EVERYTHING, "batch": 4, "micro_batch": 1}
BFLOAT16 = ALL | {"dtype": "bfloat16"}
HALF = {"steps": 8, "batch": 3, "start": 0.5, "clip": 0.05, "t_init": "auto", "save_every": 4}
HALF |= {"estimator": "straight_through", "reencode_every": 3}
STOPPED = HALF | {"stop_after": 6}
GPU = {"device": "cuda", "dtype": "float32"}
GREEDY = {"mode": "greedy", "steps": 4, "batch": 2, "save_every": 1}


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
        layers=("1.self_attn.q_proj", "1.self_attn.k_proj", "1.mlp.up_proj", "0.self_attn.v_proj"),
        data=(str(shelf / "text.txt"),),
    )
    student = quantize_model(source.model, config, tokenizer=source.tokenizer)
    (shelf / "student").mkdir()
    save_quantized(student, source.tokenizer, shelf / "student", base=base)
    (shelf / "saved-by-one").mkdir()
    stopped = STOPPED | {"directory": "saved-by-one"}
    jobs = {"all-1": ALL, "bfloat16-1": BFLOAT16, "half-1": HALF, "stopped-1": stopped}
    run_jobs(shelf, {name: ("train", job) for name, job in jobs.items()})
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
    options += ["--steps", "3", "--ctx", "32", "--windows", "8"]
    return [*options, "--held-out", "0", "--save-every", "1"]


@pytest.fixture
def two(folder: Path) -> Path:
    """What two ranks gave: a whole run, interrupted ones, one gone on with, a quantization."""
    jobs = {
        "all-2": ("train", ALL),
        "bfloat16-2": ("train", BFLOAT16),
        "half-2": ("train", STOPPED | {"directory": "saved"}),
        "half-12": ("train", HALF | {"directory": "saved-by-one", "resume": True}),
        "greedy-2": ("train", GREEDY | {"stop_after": 6, "directory": "saved-greedy"}),
        "ptq-2": ("quantize", {}),
        "commands": [commands(folder, "by-two")],
    }
    for name in ("saved", "saved-greedy"):
        (folder / name).mkdir(exist_ok=True)
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


def check_alike(folder: Path, job: str, other: str) -> None:
    """The same losses, measurements and evaluations, and nearly the same codes."""
    a, b = history(folder, job), history(folder, other)
    assert len(a) == len(b) == (STEPS if job.startswith("all") else HALF["steps"])
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - {"seconds", "layers"}:
            tolerance = 1e-4 if key in ("loss", "heldout_kl", "temperature") else 2e-2
            assert x[key] == pytest.approx(y[key], rel=tolerance, abs=1e-6), key
        assert x.get("layers", {}).keys() == y.get("layers", {}).keys()
    first, second = (load_file(folder / f"{name}.safetensors") for name in (job, other))
    same = [float((first[name] == second[name]).float().mean()) for name in first]
    assert min(same) > 0.98
    assert bool((first["changed"] > 0).all())


def test_two_ranks_give_the_losses_of_one(two: Path) -> None:
    check_alike(two, "all-1", "all-2")


def test_two_ranks_in_bfloat16_give_the_losses_of_one_to_its_rounding(two: Path) -> None:
    a, b = ([x["loss"] for x in history(two, f"bfloat16-{ranks}")] for ranks in (1, 2))
    assert a == pytest.approx(b, rel=0.03, abs=2e-4)
    assert a != pytest.approx([x["loss"] for x in history(two, "all-1")], rel=1e-4)


def test_three_ranks_give_the_losses_of_one(three: Path) -> None:
    check_alike(three, "all-1", "all-3")


def test_a_run_saved_on_two_ranks_goes_on_on_three(three: Path) -> None:
    check_alike(three, "half-1", "half-3")


def test_a_run_saved_on_two_ranks_goes_on_on_one(two: Path) -> None:
    shutil.copytree(two / "saved", two / "saved-1")
    job = HALF | {"directory": "saved-1", "resume": True}
    run_jobs(two, {"half-21": ("train", job)})
    check_alike(two, "half-1", "half-21")


def test_a_run_saved_on_one_rank_goes_on_on_two(two: Path) -> None:
    check_alike(two, "half-1", "half-12")


def test_a_run_saved_on_two_ranks_and_then_on_one_goes_on_on_one(two: Path) -> None:
    """The first one leaves a directory of parts; the second one removes it."""
    shutil.copytree(two / "saved", two / "saved-21")
    (parts,) = (two / "saved-21").glob("train_state-*")
    job = HALF | {"directory": "saved-21", "resume": True}
    run_jobs(two, {"stopped-21": ("train", job | {"stop_after": 3, "save_every": 1})})
    assert not parts.exists()
    assert len(load_file(two / "saved-21" / STATE)) > 10
    run_jobs(two, {"half-211": ("train", job)})
    check_alike(two, "half-1", "half-211")


def test_stages_saved_on_two_ranks_go_on_on_one(two: Path) -> None:
    run_jobs(two, {"greedy-1": ("train", GREEDY)})
    job = GREEDY | {"directory": "saved-greedy", "resume": True}
    run_jobs(two, {"greedy-21": ("train", job)})
    first, second = (load_file(two / f"greedy-{name}.safetensors") for name in ("1", "21"))
    assert min(float((first[k] == second[k]).float().mean()) for k in first) > 0.98
    a, b = history(two, "greedy-1"), history(two, "greedy-21")
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-4)


def test_each_rank_writes_its_own_part(two: Path) -> None:
    state, (parts,) = two / "saved" / STATE, (two / "saved").glob("train_state-*")
    assert not [name for name in load_file(state) if ".latent" in name and ".step" not in name]
    first, second = (load_file(path) for path in sorted(parts.iterdir()))
    assert first.keys() == second.keys()
    (latent,) = {tuple(t.shape[1:]) for k, t in first.items() if k.endswith(".latent")}
    assert latent == (128, 2)


def lose_a_part(saved: Path, parts: Path) -> None:
    sorted(parts.iterdir())[0].unlink()


def add_another(saved: Path, parts: Path) -> None:
    save_file({"0/x.latent": torch.zeros(2)}, parts / "x.safetensors")


def mix_in_another(saved: Path, parts: Path) -> None:
    shutil.copy(sorted(parts.iterdir())[0], parts / "x.safetensors")


def cut(saved: Path, parts: Path) -> None:
    path = sorted(parts.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-8])


def lose_all(saved: Path, parts: Path) -> None:
    shutil.rmtree(parts)


def lead_elsewhere(saved: Path, parts: Path) -> None:
    parts.rename(saved.parent / "elsewhere")
    with safe_open(str(saved / STATE), "pt") as file:
        metadata = file.metadata() | {"shared": "../elsewhere"}
    save_file(load_file(saved / STATE), saved / STATE, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_part, "lacks a part"),
        (add_another, r"0/x\.latent is missing, or does not belong"),
        (mix_in_another, "lacks a part"),
        (cut, "is damaged"),
        (lose_all, "is damaged"),
        (lead_elsewhere, "no directory of a state beside it"),
    ],
)
def test_a_damaged_state_is_refused(
    two: Path, tmp_path: Path, damage: Callable[[Path, Path], None], message: str
) -> None:
    saved = shutil.copytree(two / "saved", tmp_path / "saved")
    damage(saved, next(saved.glob("train_state-*")))
    job = HALF | {"directory": str(saved), "resume": True}
    with pytest.raises(ValueError, match=message) as error:
        run_jobs(two, {"damaged": ("train", job)})
    assert "start over with --force" in str(error.value)


OPENED: list[str] = []


@pytest.fixture
def opened() -> list[str]:
    """Paths that are opened from now on; the hook stays, and stays quiet."""
    if not OPENED:
        sys.addaudithook(
            lambda event, args: OPENED.append(str(args[0])) if event == "open" else None
        )
    OPENED[:] = ["nothing yet"]
    return OPENED


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_is_read(two: Path, tmp_path: Path, opened: list[str]) -> None:
    saved = shutil.copytree(two / "saved", tmp_path / "saved")
    (parts,) = saved.glob("train_state-*")
    for name in (".metadata", "__0.metadata", "__0_0.distcp"):
        (parts / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    job = HALF | {"directory": str(saved), "resume": True}
    opened.clear()
    run_jobs(two, {"half-trap": ("train", job)})
    assert any(path.startswith(str(saved)) for path in opened)
    assert not [path for path in opened if path.endswith((".metadata", ".distcp"))]
    assert not (tmp_path / "sprung").exists()
    check_alike(two, "half-1", "half-trap")


def test_a_killed_rank_leaves_a_whole_state(tmp_path: Path) -> None:
    """Of every operation on files of two saves on two ranks."""
    script = Path(__file__).with_name("kill_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(tmp_path), "24"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    left = json.loads(done.stdout)
    assert left.keys() == {"0", "1", "2"}
    assert sum(left.values()) == 48


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
    cuda = {"device": "cuda"}
    jobs = {"train": ("train", ALL | GPU), "ptq": ("quantize", cuda)}
    run_jobs(folder, {f"all-{name}-gpu-1": job for name, job in jobs.items()})
    torchrun(folder, 2, {f"all-{name}-gpu-2": job for name, job in jobs.items()} | cuda)
    check_alike(folder, "all-train-gpu-1", "all-train-gpu-2")
    check_quantized_alike(folder, "all-ptq-gpu-1", "all-ptq-gpu-2")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_run_saved_on_two_gpus_goes_on_on_one(folder: Path) -> None:
    gpu = GPU | {"directory": "saved-gpu"}
    (folder / "saved-gpu").mkdir()
    jobs: dict[str, Any] = {"half-gpu-2": ("train", STOPPED | gpu), "device": "cuda"}
    torchrun(folder, 2, jobs)
    run_jobs(folder, {"half-gpu-1": ("train", HALF | GPU)})
    run_jobs(folder, {"half-gpu-21": ("train", HALF | gpu | {"resume": True})})
    check_alike(folder, "half-gpu-1", "half-gpu-21")


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
