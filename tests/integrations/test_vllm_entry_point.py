"""How vLLM finds the plugin, where it is installed and where it is not."""

from __future__ import annotations

import importlib.util
from importlib.metadata import EntryPoint, entry_points

import pytest


@pytest.fixture
def entry_point() -> EntryPoint:
    """The plugin's."""
    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "softtrellis"]
    if not found:
        pytest.skip("needs softtrellis installed, not only on the path")
    return found[0]


def test_the_entry_point(entry_point: EntryPoint) -> None:
    assert entry_point.value == "softtrellis.integrations.vllm:register"
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ImportError, match="plugin of vLLM; install vLLM"):
            entry_point.load()
    else:
        from softtrellis.integrations.vllm import register

        assert entry_point.load() is register
