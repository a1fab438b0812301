"""Help, versions, and options that make no sense."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli.support import Command, Refused

from softtrellis import __version__
from softtrellis.cli.main import build_parser, main
from softtrellis.cli.quantize import configs
from softtrellis.cli.train import config_of
from softtrellis.recipes.qat import DistillConfig

COMMANDS = ["quickstart", "quantize", "plan", "train", "eval", "generate", "chat"]
COMMANDS += ["inspect", "export", "import", "report", "bench", "env"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert re.findall(r"^    (\w+)(?: |$)", out, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_works(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = help_of(command, capsys).partition("example:\n")[2].strip()
    name, *arguments = shlex.split(example)
    assert name == "softtrellis"
    assert build_parser().parse_args(arguments).command == command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    assert "--debug" in text
    actions = build_parser()._subparsers._group_actions[0].choices[command]._actions
    assert all(action.help for action in actions)
    assert "['" not in text


def test_defaults_of_zero_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "of the rotations (default: 0)" in help_of("quantize", capsys)


def test_help_needs_no_heavy_imports() -> None:
    code = (
        "import sys\n"
        "from softtrellis.cli.main import main\n"
        f"for command in {COMMANDS}:\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'numba', 'matplotlib', 'lm_eval'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    command = [sys.executable, "-m", "softtrellis", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"softtrellis {__version__}\n")


def test_env(softtrellis: Command) -> None:
    result = softtrellis("env")
    facts = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert result.code == 0
    assert facts["softtrellis"] == __version__
    assert facts["python"] == sys.version.split()[0]
    assert facts.keys() >= {"torch", "transformers", "numba", "processor", "cores", "gpu"}
    assert result.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND; see softtrellis --help"),
        (["compress"], "invalid choice: 'compress'"),
        (["quantize", "m"], "required: -o/--output; see softtrellis quantize --help"),
        (["quantize", "m", "-o", "d", "--L", "many"], "--L: invalid int value: 'many'"),
        (
            ["quantize", "m", "-o", "d", "--wide"],
            "unrecognized arguments: --wide; see softtrellis quantize --help",
        ),
        (["train", "d", "-o", "e"], "required: --teacher"),
        (["train", "d", "--teacher", "m", "-o", "e", "--t-init", "hot"], "--t-init: invalid"),
        (["train", "d", "--teacher", "m", "-o", "e", "--mode", "all"], "--mode: invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_do_not_exist(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused(*arguments, code=2)


@pytest.mark.parametrize(
    "command", ["quickstart", "quantize m -o d", "train d --teacher m -o e", "eval m"]
)
def test_texts_of_a_repeated_option_are_all_taken(command: str) -> None:
    def texts(*options: str) -> list[str] | None:
        found: list[str] | None = build_parser().parse_args([*command.split(), *options]).data
        return found

    default = texts()
    assert default == (None if command == "eval m" else ["pydoc"])
    assert texts("--data", "a", "--data", "b", "c") == ["a", "b", "c"]
    assert texts("--data", "pydoc") == ["pydoc"]
    assert texts() == default


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--L 3", "--L must be from 4 to 16, got 3"),
        ("--bits 5", "--bits must be from 1 to 4 bits per weight, got 5"),
        ("--bits 4 --L 4 --code mul1", "k * V must be smaller than L"),
        ("--code zip", "unknown code 'zip'; use one of 1mad, "),
        ("--L 8", "'hyb' needs L of at least 10, got 8; use 'gaussian'"),
        ("--profile exl3 --L 12", "profile 'exl3' has L=16, got 12; use profile 'qtip'"),
        ("--profile exl3 --code hyb", "profile 'exl3' has the codes mul1, mcg, 3inst"),
        ("--ctx 1", "--ctx must be at least 2, got 1"),
        ("--windows 0", "--windows must be at least 1, got 0"),
        ("--damping 0", "--damping must be a positive number, got 0.0"),
        ("--damping inf", "--damping must be a positive number, got inf"),
        ("--layers ,", "--layers is empty; name some"),
    ],
)
def test_quantize_settings(refused: Refused, tmp_path: Path, options: str, message: str) -> None:
    found = refused("quantize", "model", "-o", tmp_path / "out", *options.split(), code=2)
    assert message in found
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--t-init 0", "--t-init must be a positive number, got 0.0"),
        ("--t-init nan", "--t-init must be a positive number, got nan"),
        ("--t-min -1", "--t-min must be a positive number, got -1.0"),
        ("--t-init 0.01", "--t-min must not be above t_init, got 0.03 and 0.01"),
        ("--lr 0", "--lr must be a positive number, got 0.0"),
        ("--lr inf", "--lr must be a positive number, got inf"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--batch 0", "--batch must be at least 1, got 0"),
        ("--ctx 1", "--ctx must be at least 2, got 1"),
        ("--windows 0", "--windows must be at least 1, got 0"),
        ("--warmup -1", "--warmup must be at least 0, got -1"),
        ("--save-every -1", "--save-every must be 0 (never) or more, got -1"),
        ("--finish-share 0.5", "--finish-share must be left out where no finish is named"),
        ("--finish soft --finish-share 0", "--finish-share must be above 0 with finish"),
        ("--viterbi-every 4 --estimator soft", "--viterbi-every must be left out where neither"),
        ("--teacher-share 0.5", "--teacher-share must be left out where the data are not"),
        ("--data a teacher --teacher-share 1", "--teacher-share must be above 0 and below 1"),
        ("--data a teacher --windows 1", "--windows must be at least 2 where the teacher"),
        ("--data teacher a teacher", "'teacher' must be named once, got teacher a teacher"),
        ("--mode single", "--layers must name some layers in mode 'single'"),
    ],
)
def test_train_settings(refused: Refused, tmp_path: Path, options: str, message: str) -> None:
    found = refused(
        "train", "d", "--teacher", "m", "-o", tmp_path / "out", *options.split(), code=2
    )
    assert message in found
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--L 9", "--L must be at least 10"),
        ("--steps 0", "--steps must be at least 1"),
        ("--windows 1", "--windows must be at least 2"),
        ("--lr -1", "--lr must be a positive number"),
    ],
)
def test_quickstart_settings(refused: Refused, tmp_path: Path, options: str, message: str) -> None:
    assert message in refused("quickstart", "-o", tmp_path / "out", *options.split(), code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "m"], "named twice"),
        (["m", "--ctx", "1"], "--ctx must be at least 2"),
        (["m", "--windows", "0"], "--windows must be at least 1"),
        (
            ["m", "--json", "no/such/folder/out.json"],
            "--json must be a file in a directory that exists",
        ),
        (["m", "--tasks", " ,"], "--tasks is empty; name some, for instance arc_easy"),
        (["m", "--tasks", "piqa,piqa"], "--tasks must not be named twice"),
        (["m", "--tasks", "piqa", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["m", "--tasks", "piqa", "--limit", "half"], "--limit: invalid int value: 'half'"),
        (["m", "--limit", "5"], "--limit needs --tasks"),
        (["m", "--task-dir", "d"], "--task-dir needs --tasks"),
    ],
)
def test_eval_settings(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused("eval", *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "several runs need -o FILE.html"),
        (["a", "a", "-o", "page.html"], "a run is named twice"),
        (["a", "b", "-o", "page.txt"], "--output must be a file NAME.html"),
        (["a", "-o", "no/such/folder/page.html"], "in a directory that exists"),
    ],
)
def test_report_settings(refused: Refused, arguments: list[str], message: str) -> None:
    assert message in refused("report", *arguments, code=2)


@pytest.mark.parametrize(
    "arguments",
    [["quantize", "m", "-o", "out"], ["train", "d", "--teacher", "m", "-o", "out"]],
)
def test_triton_without_a_gpu(
    refused: Refused, tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = refused(*arguments, "--backend", "triton", code=2)
    assert "backend 'triton'" in message
    assert "use backend='torch'" in message or "--backend" in message
    assert not list(tmp_path.iterdir())


def test_train_and_its_config_have_the_same_defaults() -> None:
    line = ["train", "d", "--teacher", "m", "-o", "out"]
    config = config_of(build_parser().parse_args(line))
    assert replace(config, show_progress=False) == DistillConfig()


@pytest.mark.parametrize(
    ("words", "L"), [("", 16), ("--code scalar", 8), ("--code scalar --L 4", 4)]
)
def test_bits_of_a_state(words: str, L: int) -> None:
    line = f"quantize m -o d {words}"
    assert configs(build_parser().parse_args(line.split()))[0].trellis_code.spec.L == L


def test_a_state_without_bits_is_refused() -> None:
    line = ["quantize", "m", "-o", "d", "--L", "0"]
    with pytest.raises(ValueError, match="L must be"):
        configs(build_parser().parse_args(line))
