"""Versions and devices, for reports and bug reports."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from softtrellis import __version__

PACKAGES = (
    "transformers",
    "numba",
    "numpy",
    "triton",
    "safetensors",
    "gguf",
    "datasets",
    "lm_eval",
)


def environment() -> dict[str, str]:
    """What ran, in words: package versions, processor, devices."""
    facts = {
        "softtrellis": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["processor"] = _processor()
    facts["cores"] = f"{len(os.sched_getaffinity(0))} ({torch.get_num_threads()} torch threads)"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["gpu"] = ", ".join(gpus) or "none"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
