"""The shape of the package: who may import whom, what is public, what an import costs."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import softtrellis

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "softtrellis"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ORDER = (
    "spec",
    "extras",
    "backend",
    "codes",
    "trellis",
    "transforms",
    "quantizers",
    "modules",
    "io",
    "evaluation",
    "recipes",
    "integrations",
    "cli",
)
PUBLIC = (
    "DistillConfig",
    "QuantizeConfig",
    "TrellisSpec",
    "__version__",
    "bcjr",
    "codebook",
    "distill",
    "load_quantized",
    "pack",
    "quantize_model",
    "unpack",
    "viterbi",
)
HEAVY = ("torch", "triton", "transformers", "numba", "numpy", "matplotlib", "datasets", "gguf")
HEAVY += ("lm_eval",)
MAX_LINES = 400


def module_name(path: Path) -> str:
    parts = ("softtrellis", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    """Absolute names of everything that a file imports, at its top or inside a function."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            if target == "softtrellis":
                yield from (f"softtrellis.{alias.name}" for alias in node.names)
            else:
                yield target


def violations(module: str, text: str, *, is_package: bool = False) -> list[str]:
    """What a file imports against the order; the entry points at the top may import anything."""
    parts = module.split(".")
    if parts in (["softtrellis"], ["softtrellis", "__main__"]):
        return []
    if parts[1] not in ORDER:
        return [f"{module} is in none of the layers"]
    allowed = [[name] for name in (*ORDER[: ORDER.index(parts[1]) + 1], "__version__")]
    targets = imported_modules(ast.parse(text), module, is_package=is_package)
    return [
        f"{module} imports {target}"
        for target in targets
        if target.split(".")[0] == "softtrellis" and target.split(".")[1:2] not in allowed
    ]


def test_files_import_only_from_their_own_layer_or_from_the_left() -> None:
    found = [
        violation
        for path in SOURCES
        for violation in violations(
            module_name(path), path.read_text("utf-8"), is_package=path.name == "__init__.py"
        )
    ]
    assert found == []


@pytest.mark.parametrize(
    ("module", "line", "bad"),
    [
        pytest.param("codes.hybrid", "from softtrellis.spec import TrellisSpec", False, id="left"),
        pytest.param("codes.hybrid", "from softtrellis.codes.computed import f", False, id="own"),
        pytest.param("codes.hybrid", "import softtrellis.trellis.bcjr", True, id="right"),
        pytest.param("spec", "from softtrellis.backend import Backend", True, id="right-file"),
        pytest.param("spec", "from softtrellis import backend", True, id="right-from-package"),
        pytest.param("cli.main", "from softtrellis import __version__", False, id="version"),
        pytest.param("cli.main", "from softtrellis import bcjr", True, id="public-name"),
        pytest.param("cli.main", "import softtrellis", True, id="whole-package"),
        pytest.param("io.text", "from . import sources", False, id="relative-own"),
        pytest.param("io.text", "from ..recipes import ptq", True, id="relative-right"),
        pytest.param("io.text", "def f():\n    from ..cli.main import main", True, id="inside"),
        pytest.param("misc", "import os", True, id="no-layer"),
    ],
)
def test_order_is_enforced(module: str, line: str, bad: bool) -> None:
    assert bool(violations(f"softtrellis.{module}", line)) == bad


def test_public_names() -> None:
    assert tuple(softtrellis.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(softtrellis))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_can_be_had_and_is_the_one_defined_under_it(name: str) -> None:
    value = getattr(softtrellis, name)
    if name == "__version__":
        assert value[0].isdigit()
    else:
        assert value.__name__ == name
        assert value.__module__.startswith("softtrellis.")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'vitterbi'"):
        _ = softtrellis.vitterbi


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        pytest.param("import softtrellis", HEAVY, id="package"),
        pytest.param(
            "from softtrellis import TrellisSpec, bcjr, viterbi, pack",
            ("triton", "torch._dynamo", "transformers", "matplotlib", "datasets", "gguf"),
            id="trellis",
        ),
        pytest.param(
            "import torch\n"
            "from softtrellis import TrellisSpec, codebook, viterbi\n"
            "spec = TrellisSpec(4, 1, 1)\n"
            "viterbi(torch.zeros(1, 8, 1), codebook('gaussian', spec), spec, backend='torch')",
            ("triton", "torch._dynamo", "transformers", "numba"),
            id="viterbi",
        ),
        pytest.param(
            "import softtrellis.cli.main",
            ("triton", "transformers", "numba", "matplotlib", "datasets", "lm_eval"),
            id="command-line",
        ),
        pytest.param("import softtrellis.evaluation.report", ("torch", "matplotlib"), id="report"),
        pytest.param("import softtrellis.recipes.pipeline", ("lm_eval", "datasets"), id="pipeline"),
    ],
)
def test_imports_are_light(statement: str, absent: tuple[str, ...]) -> None:
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert set(absent) & set(json.loads(run.stdout)) == set()


def test_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_files_stay_short() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
