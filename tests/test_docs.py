"""The documentation: its code runs, its links and options exist, its reader reads."""

from __future__ import annotations

import re
import runpy
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from softtrellis.io.checkpoint import BaseModel, load_quantized, save_quantized
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.modules.replace import linear_names, quantized_layers, replace_modules
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
    "hyb of QTIP's files": (TrellisCode(TrellisSpec(16, 2, 2), flip="first"), {}),
    "gaussian": (TrellisCode(TrellisSpec(9, 3, 1), "gaussian"), {}),
    "1mad": (TrellisCode(TrellisSpec(16, 3, 1), "1mad"), {}),
    "mul1": (TrellisCode(TrellisSpec(10, 4, 1), "mul1"), {}),
    "exl3": (TrellisCode(TrellisSpec(16, 2, 1), "mul1", normalize=False, order="exl3"), EXL3),
    "exl3 mcg": (TrellisCode(TrellisSpec(16, 1, 1), "mcg", normalize=False, order="exl3"), EXL3),
    "exl3 3inst": (TrellisCode(TrellisSpec(16, 4, 1), "3inst", normalize=False, order="exl3"), EXL3),
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
        replace_modules(tiny_llama, linear_names(tiny_llama), make)
    base = BaseModel("tiny", "0" * 64)
    save_quantized(tiny_llama, tiny_tokenizer, tmp_path, base=base)
    expected = quantized_layers(load_quantized(tmp_path))
    found = reader["read_weights"](tmp_path)
    assert found.keys() == expected.keys()
    for layer, module in expected.items():
        weight = module.weight().numpy()
        np.testing.assert_allclose(found[layer], weight, rtol=0, atol=3e-6 * np.abs(weight).max())


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
