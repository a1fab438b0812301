"""Kills quantize and train again and again, goes on, and compares with a run that nobody disturbed.

python scripts/faults.py --random 30 --operation 80 --write 30

A tiny model is quantized and trained once undisturbed. Then the same commands are killed

- at random moments (SIGKILL after a random time),
- before an operation on files that Python makes below the output's parent (SIGKILL from an audit
  hook: every opening, renaming and removal in turn),
- in the middle of a write (the limit of a file's size, without a handler for SIGXFSZ),

half of them with --force over an older output. After each kill nothing may be torn: the output is
the older one, the new one or not there, and every saved state can be read. Then the command goes on
with --resume, or starts again if nothing was saved, and may be killed once more. In the end all
files must equal the undisturbed run's byte for byte, except for the seconds in log.jsonl.

Every run is a fork of a process that has imported everything and computed nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import transformers
import transformers.models.llama.modeling_llama  # noqa: F401
from safetensors import safe_open

import softtrellis.cli.quantize
import softtrellis.cli.train
import softtrellis.recipes.pipeline
import softtrellis.trellis.bcjr_torch
import softtrellis.trellis.viterbi_torch
from softtrellis.cli.main import main as softtrellis
from softtrellis.io.files import STATES

LAYERS = "model.layers.0.mlp.down_proj,model.layers.1.self_attn.k_proj"
QUANTIZE = [
    "--backend",
    "torch",
    "--ctx",
    "32",
    "--windows",
    "4",
    "--code",
    "1mad",
    "--L",
    "4",
    "--layers",
    LAYERS,
]
QUANTIZE += ["--end-to-end", "2"]
TRAIN = ["--backend", "torch", "--ctx", "32", "--windows", "8", "--batch", "2", "--held-out", "2"]
TRAIN += ["--steps", "6", "--estimator", "soft", "--start", "0"]
TRAIN += ["--warmup", "1", "--lr", "0.1", "--save-every", "2", "--evaluate-every", "3"]
TRAIN += ["--measure-every", "2", "--reencode-every", "3"]
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}

Kill = Callable[[], None]
"""What a child does about its own end before it starts."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, or minus the signal that killed it; and its messages."""

    code: int
    seconds: float
    messages: str


def run(command: list[str], messages: Path, *, kill: Kill | None = None, after: float = 0) -> Ended:
    """A command in a process of its own; with ``after`` it is killed after so many seconds."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            output = os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(1)
            if kill is not None:
                kill()
            code = softtrellis(command)
        finally:
            os._exit(code)
    handle = os.pidfd_open(child)
    ready, _, _ = select.select([handle], [], [], after or 600)
    os.close(handle)
    if not ready:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, time.monotonic() - start, messages.read_text("utf-8", "replace"))


def operations_below(root: Path, act: Callable[[int], None]) -> None:
    """Calls ``act`` with 0, 1, ... before each operation of this process on a file below root."""
    number, home = count(), str(root.resolve())

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in OPERATIONS and any(
            isinstance(a, str | os.PathLike) and os.path.abspath(os.fspath(a)).startswith(home)
            for a in arguments[:2]
        ):
            act(next(number))

    sys.addaudithook(hook)


def die_before_operation(root: Path, number: int) -> Kill:
    """SIGKILL before the operation of that number on a file below ``root``."""

    def act(here: int) -> None:
        if here == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: operations_below(root, act)


def die_in_writing(size: int) -> Kill:
    """The end, without a chance to clean up, once a file grows beyond ``size`` bytes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def contents(directory: Path) -> dict[str, bytes]:
    """All files below a directory, with the clock's readings in the log set to zero."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "log.jsonl":
                records = [json.loads(line) | {"seconds": 0} for line in data.splitlines()]
                data = json.dumps(records).encode()
            found[str(path.relative_to(directory))] = data
    return found


class Trials:
    """Kills one command, and compares.

    Attributes:
        counts: what happened how often.
    """

    def __init__(self, name: str, command: list[str], place: Path, chance: random.Random) -> None:
        self.name, self.command, self.place, self.chance = name, command, place, chance
        self.counts: Counter[str] = Counter()
        self.messages = place / f"{name}.txt"
        reference = place / f"{name}-reference" / "out"
        self._undisturbed(reference, None)
        assert "kept the code it started from" not in self.messages.read_text("utf-8"), name
        self.reference = contents(reference)
        self.largest = max(map(len, self.reference.values()))
        tally = place / f"{name}-operations"
        counted = place / f"{name}-counted" / "out"

        def count_operations() -> None:
            operations_below(counted.parent, lambda _: os.write(file, b"."))

        file = os.open(tally, os.O_WRONLY | os.O_CREAT, 0o644)
        self.seconds = self._undisturbed(counted, count_operations).seconds
        os.close(file)
        self.operations = tally.stat().st_size
        self.identical = contents(counted) == self.reference

    def _undisturbed(self, output: Path, kill: Kill | None) -> Ended:
        output.parent.mkdir(exist_ok=True)
        ended = run([*self.command, "-o", str(output)], self.messages, kill=kill)
        assert ended.code == 0, ended
        return ended

    def trial(self, number: int, kind: str) -> None:
        """One output that is killed once or twice and then finished."""
        parent = self.place / f"{self.name}-{kind}-{number}"
        output = parent / "out"
        parent.mkdir()
        older: dict[str, bytes] = {}
        command = [*self.command, "-o", str(output)]
        if self.chance.random() < 0.5:
            output.mkdir()
            (output / "older").write_text("keep me", "utf-8")
            older = contents(output)
            command += ["--force"]
        left, resume = self.chance.choice([1, 1, 2]), False
        while True:
            now = kind if left > 0 else "never"
            ended = self._killed(command + ["--resume"] * resume, parent, now, number)
            left -= 1
            if ended.code == 0:
                break
            text = ended.messages
            if ended.code < 0:
                self.counts["killed"] += 1
                if self._after_kill(output, older):
                    return
                resume = True
            elif "there is no interrupted run" in text:
                self.counts["started again, nothing was saved"] += 1
                resume = False
            else:
                raise AssertionError(f"{parent}: exit code {ended.code}: {text}")
        found = contents(output)
        assert found == self.reference, differences(found, self.reference, parent)
        self.counts["resumed to the same bytes" if resume else "ended with the same bytes"] += 1
        stray = {path.name for path in parent.iterdir()} - {"out"}
        aside = {name for name in stray if name.startswith(".out-")}
        assert stray == aside, f"{parent}: {stray}"
        self.counts["left the older output aside"] += len(aside)
        shutil.rmtree(parent)

    def _killed(self, command: list[str], parent: Path, kind: str, number: int) -> Ended:
        if kind == "random":
            after = self.chance.uniform(0.02, 1.02) * self.seconds
            return run(command, self.messages, after=after)
        kill = None
        if kind == "operation":
            kill = die_before_operation(parent, number // 2 % self.operations)
        elif kind == "write":
            kill = die_in_writing(self.chance.randrange(1, self.largest))
        return run(command, self.messages, kill=kill)

    def _after_kill(self, output: Path, older: dict[str, bytes]) -> bool:
        """Checks what a kill left; whether the output is finished already."""
        partial = output.with_name("out.partial")
        states = [path for path in partial.glob(STATES) if path.suffix == ".safetensors"]
        for path in states:
            with safe_open(str(path), "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        self.counts["killed with a saved state" if states else "killed without one"] += 1
        if not output.exists():
            aside = [contents(path) for path in output.parent.glob(".out-*/out")]
            assert not older or aside == [older], f"{output}: the older output is lost"
            return False
        found = contents(output)
        if older and found == older:
            return False
        new = {name: data for name, data in found.items() if not Path(name).match(STATES)}
        assert new == self.reference, differences(new, self.reference, output.parent)
        self.counts["killed when all was done"] += 1
        return True


def differences(found: dict[str, bytes], wanted: dict[str, bytes], place: Path) -> str:
    """The names of the files that differ."""
    names = sorted(found.keys() | wanted.keys())
    return f"{place}: {[name for name in names if found.get(name) != wanted.get(name)]} differ"


def make_model(directory: Path) -> None:
    """A random Llama of two layers with one token per character."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    letters = {chr(code): i for i, code in enumerate(range(32, 127))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def in_child(work: Callable[[], None]) -> None:
    """Does work in a fork, so that this process has computed nothing when it forks again."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def commands(place: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands to kill, without their outputs; their inputs are made on the way."""
    model, text, checkpoint = (str(place / name) for name in ("model", "text.txt", "checkpoint"))
    in_child(lambda: make_model(Path(model)))
    letters = random.Random(0).choices("abcdefgh ", k=4000)
    Path(text).write_text("".join(letters), "utf-8")
    quantize = ["quantize", model, "--data", text, *QUANTIZE]
    yield "quantize", quantize
    ended = run([*quantize, "-o", checkpoint], place / "checkpoint.txt")
    assert ended.code == 0, ended
    yield "train", ["train", checkpoint, "--teacher", model, "--data", text, *TRAIN]


def main() -> None:
    """Prints what happened how often, as JSON; an AssertionError says what broke."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for kind, outputs, what in (
        ("random", 30, "at random moments"),
        ("operation", 80, "before operations on files, one after the other"),
        ("write", 30, "in the middle of writes"),
    ):
        parser.add_argument(
            f"--{kind}", type=int, default=outputs, metavar="N", help=f"kill N outputs {what}"
        )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for position, (name, command) in enumerate(commands(Path(folder))):
            trials = Trials(name, command, Path(folder), random.Random(f"{options.seed} {name}"))
            for kind in ("random", "operation", "write"):
                # Half of them for each of the two commands.
                for number in range(position, getattr(options, kind), 2):
                    trials.trial(number, kind)
                    trials.counts[f"outputs, {kind}"] += 1
            results[name] = {
                "seconds undisturbed": round(trials.seconds, 2),
                "operations on files": trials.operations,
                "two undisturbed runs are the same": trials.identical,
                **dict(sorted(trials.counts.items())),
            }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
