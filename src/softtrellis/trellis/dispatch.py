"""The module of a backend, loaded when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Literal

from softtrellis.backend import ResolvedBackend


def implementation(operation: Literal["bcjr", "viterbi"], backend: ResolvedBackend) -> ModuleType:
    """``trellis/OPERATION_BACKEND.py``."""
    return import_module(f"softtrellis.trellis.{operation}_{backend}")
