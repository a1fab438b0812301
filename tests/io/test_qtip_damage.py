"""QTIP's files from strangers: whatever is in them, they load, or a ValueError says why not."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qtip_files import write
from untrusted import altered, bounded, copy_of, with_damaged_bytes, with_damaged_tensors

from softtrellis.io.checkpoint import WEIGHTS
from softtrellis.io.manifest import CheckpointError
from softtrellis.io.qtip import load_qtip

FILES = [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qtip")


@pytest.fixture
def whole(shelf: Path, request: pytest.FixtureRequest) -> Path:
    """A good model; copy it before changing it."""
    if not (shelf / "whole").exists():
        write(shelf / "whole", request.getfixturevalue("tiny_tokenizer"))
        load_qtip(shelf / "whole")
    return shelf / "whole"


def loads_or_says_why(directory: Path) -> None:
    with bounded(directory.parent), suppress(ValueError):
        load_qtip(directory)


@given(file=st.sampled_from(FILES), data=st.data())
def test_bytes(whole: Path, file: str, data: st.DataObject) -> None:
    with with_damaged_bytes(whole, file, data) as directory:
        loads_or_says_why(directory)


@given(data=st.data())
def test_tensors(whole: Path, data: st.DataObject) -> None:
    with with_damaged_tensors(whole, data) as directory:
        loads_or_says_why(directory)


@given(data=st.data())
def test_settings(whole: Path, data: st.DataObject) -> None:
    config = json.loads((whole / "config.json").read_text("utf-8"))
    if data.draw(st.booleans()):
        config["quip_params"] = data.draw(altered(config["quip_params"]))
    else:
        config = data.draw(altered(config))
    with copy_of(whole) as directory:
        (directory / "config.json").write_text(json.dumps(config), "utf-8")
        loads_or_says_why(directory)


@pytest.mark.parametrize("size", [0, 8])
def test_layers_smaller_than_a_tile(whole: Path, size: int) -> None:
    config = json.loads((whole / "config.json").read_text("utf-8"))
    with copy_of(whole) as directory:
        changed = config | {"intermediate_size": size}
        (directory / "config.json").write_text(json.dumps(changed), "utf-8")
        with pytest.raises(CheckpointError, match=rf"has {size} channels, fewer than a tile"):
            load_qtip(directory)
