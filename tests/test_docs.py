"""The documentation: its code runs, its links and options exist, its reader reads."""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from evaluation.support import results, write_run
from safetensors.torch import load_file

from softtrellis.cli.main import build_parser
from softtrellis.cli.train import config_of
from softtrellis.io.checkpoint import BaseModel, load_quantized, save_quantized
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.modules.replace import quantized_layers, replace_modules, select_layers
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.spec import TrellisSpec
from softtrellis.transforms.hadamard import hadamard_transform

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str, language: str = "python") -> list[str]:
    """The fenced blocks of a page in one language."""
    text = (ROOT / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(code: str, replaced: dict[str, str] | None = None) -> dict[str, Any]:
    for old, new in (replaced or {}).items():
        assert old in code, f"the page no longer says {old}"
        code = code.replace(old, new)
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile(code, "docs", "exec"), names)
    return names


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """The functions of docs/checkpoint.md."""
    (code,) = blocks("docs/checkpoint.md")
    return run(code)


EXL3 = {"multiple": 128, "block": 128, "channel_scales": True}
FORMATS: dict[str, tuple[TrellisCode, dict[str, Any]]] = {
    "hyb": (TrellisCode(TrellisSpec(12, 2, 2)), {}),
    "hyb, first flipped": (TrellisCode(TrellisSpec(16, 3, 2), flip="first"), {}),
    "gaussian": (TrellisCode(TrellisSpec(9, 3, 1), "gaussian"), {}),
    "1mad": (TrellisCode(TrellisSpec(12, 3, 1), "1mad"), {}),
    "mul1": (TrellisCode(TrellisSpec(10, 4, 1), "mul1"), {}),
    "exl3": (TrellisCode(TrellisSpec(16, 2, 1), "mul1", normalize=False, order="exl3"), EXL3),
    "mcg": (TrellisCode(TrellisSpec(16, 1, 1), "mcg", normalize=False), EXL3),
    "3inst": (TrellisCode(TrellisSpec(16, 4, 1), "3inst", order="exl3"), {}),
}


def random_layer(layer: LayerFormat, codebook: torch.Tensor) -> QuantizedLinear:
    """Any bits are a path and any signs a rotation: no encoder is needed."""
    module = QuantizedLinear(layer, codebook)
    module.codes.random_(-(2**15), 2**15)
    module.in_signs.random_(0, 256)
    module.out_signs.random_(0, 256)
    module.scale.fill_(0.37)
    if module.out_scale is not None:
        module.out_scale.uniform_(0.5, 2.0)
    return module


@pytest.mark.parametrize("name", FORMATS)
def test_the_documented_reader_reads_checkpoints(
    name: str,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    reader: dict[str, Any],
) -> None:
    code, options = FORMATS[name]
    codebook = code.codebook()

    def make(_: str, linear: torch.nn.Module) -> QuantizedLinear:
        size = int(linear.in_features), int(linear.out_features)
        return random_layer(LayerFormat(*size, code, **options), codebook)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        replace_modules(tiny_llama, select_layers(tiny_llama, ["k_proj", "down_proj"]), make)
    base = BaseModel("tiny", "0" * 64)
    save_quantized(tiny_llama, tiny_tokenizer, tmp_path, base=base)
    expected = quantized_layers(load_quantized(tmp_path))
    found = reader["read_weights"](tmp_path)
    assert found.keys() == expected.keys()
    for layer, module in expected.items():
        weight = module.weight().numpy()
        np.testing.assert_allclose(found[layer], weight, rtol=0, atol=3e-6 * np.abs(weight).max())


@pytest.mark.parametrize("version", [2, 3])
def test_the_documented_reader_reads_dense_tensors(version: int, reader: dict[str, Any]) -> None:
    folder = ROOT / f"tests/io/checkpoint_v{version}"
    dtypes = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
    assert (torch.bfloat16 in dtypes) == (version > 2)
    found = reader["read_tensors"](folder)
    expected = load_quantized(folder).state_dict()
    assert expected.keys() - found.keys() == {"lm_head.weight"}, "tied"
    for name in expected.keys() & found.keys():
        tensor = expected[name].numpy()
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name
    assert reader["read_weights"](folder).keys() == quantized_layers(load_quantized(folder)).keys()


@pytest.mark.parametrize("n", [1, 4, 16, 28, 36, 76, 100, 176, 344, 576, 600, 944])
def test_the_documented_hadamard_matrices(n: int, reader: dict[str, Any]) -> None:
    rows = hadamard_transform(torch.eye(n, dtype=torch.float64))
    np.testing.assert_allclose(reader["hadamard"](n), rows.numpy().T, atol=1e-14)


def test_the_worked_bit_example() -> None:
    from softtrellis import pack, unpack

    page = (ROOT / "docs/checkpoint.md").read_text("utf-8")
    states = [int(state) for state in re.findall(r"^state \d .*= +(\d+)$", page, re.MULTILINE)]
    spec = TrellisSpec(L=4, k=2, V=1)
    words = pack(torch.tensor([states]), spec)
    assert len(states) == 8
    assert words.item() & 0xFFFF == 0xB271
    assert words.numpy().astype("<i2").tobytes() == bytes.fromhex("71 B2")
    assert unpack(words, spec, steps=8).tolist() == [states]


def test_the_sign_example() -> None:
    from softtrellis.transforms.incoherence import pack_signs

    signs = torch.tensor([1 if sign == "+" else -1 for sign in "+--++++--"])
    assert "+ − − + + + + − −" in (ROOT / "docs/checkpoint.md").read_text("utf-8")
    assert bytes(pack_signs(signs).tolist()) == bytes.fromhex("61 80")


PUBLIC_FUNCTIONS = ("bcjr", "codebook", "distill", "load_quantized", "pack", "quantize_model")
PUBLIC_FUNCTIONS += ("unpack", "viterbi")
PUBLIC_CLASSES = ("DistillConfig", "QuantizeConfig", "TrellisSpec")


def test_every_public_name_is_documented() -> None:
    import softtrellis

    assert {*PUBLIC_FUNCTIONS, *PUBLIC_CLASSES, "__version__"} == set(softtrellis.__all__)


@pytest.mark.parametrize("name", [*PUBLIC_FUNCTIONS, *PUBLIC_CLASSES])
def test_documented_signatures(name: str) -> None:
    import softtrellis

    page = (ROOT / "docs/api.md").read_text("utf-8")
    found = re.search(rf"^### {name}\n\n```\n{name}\((.*?)\)(?: -> \w+)?\n```$", page, re.M | re.S)
    assert found, f"docs/api.md has no section of {name} that starts with its signature"
    documented = ast.parse(f"def f({found[1]}): ...").body[0]
    assert isinstance(documented, ast.FunctionDef)
    arguments = documented.args
    parameters = inspect.signature(getattr(softtrellis, name)).parameters.values()
    keyword_only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert [a.arg for a in (*arguments.args, *arguments.kwonlyargs)] == [p.name for p in parameters]
    assert [a.arg for a in arguments.kwonlyargs] == keyword_only
    by_position = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    with_default = [p.default for p in by_position if p.default is not p.empty]
    assert [ast.literal_eval(d) for d in arguments.defaults] == with_default
    of_keywords = [None if d is None else ast.literal_eval(d) for d in arguments.kw_defaults]
    expected = [p.default for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert of_keywords == [None if d is inspect.Parameter.empty else d for d in expected]


def subparsers() -> dict[str, argparse.ArgumentParser]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("the parser has no commands")


@pytest.mark.parametrize("name", subparsers())
def test_every_option_is_documented_and_nothing_else(name: str) -> None:
    page = (ROOT / "docs/api.md").read_text("utf-8")
    section = page.split(f"### softtrellis {name}\n")[1].split("\n### ")[0]
    options = {o for a in subparsers()[name]._actions for o in a.option_strings}
    quoted = " ".join(re.findall("`.*?`", section))
    documented = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", quoted))
    assert options - documented == {"-h", "--help", "--debug"}
    assert documented <= options


def commands() -> list[str]:
    lines = [
        line.partition("  #")[0].strip()
        for page in PAGES
        for block in blocks(str(page.relative_to(ROOT)), "sh")
        for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith("softtrellis ")]


def test_the_commands_on_the_pages_are_valid() -> None:
    assert len(commands()) >= 10
    for line in commands():
        build_parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if file.name == "quickstart.png":  # written by the quickstart
            continue
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_no_place_of_one_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(work|tmp|home|root|usr)/", page.read_text("utf-8"))


def test_extras_are_installed_from_the_clone() -> None:
    """No index has the package."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = set()
    for path in (*PAGES, *(ROOT / "src").rglob("*.py")):
        text = path.read_text("utf-8")
        assert "softtrellis[" not in text, path
        found |= set(re.findall(r"'\.\[(\w+)\]'|\binstall\([\"'](\w+)[\"']\)", text))
    names = {name for pair in found for name in pair if name}
    assert names == known["optional-dependencies"].keys() - {"dev"}


def test_the_trellis_example_of_the_readme() -> None:
    names = run(blocks("README.md")[0], {"L=12": "L=10", "randn(8": "randn(2"})
    assert torch.isfinite(names["w"].grad).all()
    assert names["words"].shape == (2, 32)


def test_the_example_of_the_api_page() -> None:
    names = run(blocks("docs/api.md")[0], {"L=12": "L=10", "randn(8": "randn(2"})
    assert torch.isfinite(names["w"].grad).all()


def test_the_comparison_of_the_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, mean in (("soft", -0.6), ("identity", -0.3)):
        write_run(tmp_path / name, content=results(mean))
    monkeypatch.chdir(tmp_path)
    run(blocks("docs/guide.md")[0])
    assert re.match(r"-0\.3\d* nats per token, 95% interval -", capsys.readouterr().out)


def test_the_model_example_of_the_readme(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    replaced = {
        '"smollm2-135m-instruct"': repr(str(tiny_directory)),
        'L=12, layers=("29",)': 'L=10, layers=("1.mlp.down_proj",), ctx=64, windows=2',
        "steps=40, batch=2, ctx=256, show_progress=True": "steps=2, batch=1, ctx=32, windows=2",
    }
    names = run(blocks("README.md")[1], replaced)
    trained, loaded = (quantized_layers(names[m]) for m in ("student", "model"))
    assert list(loaded) == ["model.layers.1.mlp.down_proj"]
    for name, module in loaded.items():
        assert torch.equal(module.weight(), trained[name].weight())


def test_the_loading_in_three_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "tests/io/checkpoint_v2", tmp_path / "smollm2-2bit")
    monkeypatch.chdir(tmp_path)
    loaded = run(blocks("README.md")[2])["model"]
    ids = torch.arange(8)[None]
    page = blocks("docs/huggingface.md")
    model = run(page[0] + page[1])["model"]
    assert len(quantized_layers(loaded)) == 5
    assert not quantized_layers(model)
    assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("page", ["README.md", "docs/huggingface.md"])
def test_the_loading_on_a_gpu(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "tests/io/checkpoint_v3", tmp_path / "smollm2-2bit")
    monkeypatch.chdir(tmp_path)
    imports = "import torch\nimport softtrellis.integrations.transformers\n"
    imports += "from transformers import AutoModelForCausalLM\n"
    text = (ROOT / page).read_text("utf-8")
    (call,) = re.findall(r"`(AutoModel\S*from_pretrained\(.*?device_map=.*?\))`", text)
    model = run(f"{imports}model = {call}", {'"cuda"': '"cpu"'})["model"]
    assert quantized_layers(model)
    assert model.dtype == torch.bfloat16


def test_lora_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="needs peft (.venv/bin/pip install -e '.[lora]')")
    shutil.copytree(ROOT / "tests/io/checkpoint_v2", tmp_path / "smollm2-2bit")
    monkeypatch.chdir(tmp_path)
    model = run(blocks("docs/huggingface.md")[2])["model"]
    assert model.active_adapters == ["default"]


def test_soft_quantize(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["soft_quantize.py", "--L", "10", "--tiles", "2"])
    runpy.run_path(str(ROOT / "examples/soft_quantize.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "2.000 bits per weight" in printed
    by_gradient, by_difference = map(float, re.findall(r"(-?[\d.]+) by ", printed))
    assert by_gradient == pytest.approx(by_difference, rel=0.05, abs=2e-3)


def test_quantize_own_model(
    tiny_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    options = "--layers 1.mlp.down_proj --L 10 --steps 2 --ctx 32 --windows 2"
    arguments = ["quantize_own_model.py", str(tiny_directory), str(output), *options.split()]
    monkeypatch.setattr("sys.argv", arguments)
    runpy.run_path(str(ROOT / "examples/quantize_own_model.py"), run_name="__main__")
    assert "KL, qat less ptq" in capsys.readouterr().out
    assert load_quantized(output / "qat").config.model_type == "llama"


@pytest.mark.parametrize(("last", "text"), [([], "wikitext2"), (["a text.txt"], "a text.txt")])
def test_the_commands_of_the_papers_setting_are_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: list[str], text: str
) -> None:
    recorder = tmp_path / "softtrellis"
    recorder.write_text('#!/bin/sh\nfor word; do echo "$word"; done\necho END\n', "utf-8")
    recorder.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    script = ["bash", str(ROOT / "examples/paper_llama.sh"), "llama", "held out.txt"]
    done = subprocess.run(
        [*script, str(tmp_path / "out"), "cpu", *last], capture_output=True, text=True, check=True
    )
    calls = [call.splitlines() for call in done.stdout.split("END\n")[:-1]]
    found = {call[0]: build_parser().parse_args(call) for call in calls}
    assert list(found) == ["quantize", "plan", "train", "eval", "report"]
    plan, train = found["plan"], found["train"]
    assert (plan.lr, plan.steps, plan.warmup) == (train.lr, train.steps, train.warmup)
    assert plan.temperature == train.t_init
    assert (train.data, found["eval"].data) == ([text], ["held out.txt"])
    assert config_of(train).warmup == 0  # the options make sense together
