"""Packages that not everybody needs."""

from __future__ import annotations


def install(extra: str) -> str:
    """What to do where a package of an extra of pyproject.toml is missing, for an error message."""
    return (
        f"install softtrellis with the extra {extra!r}, from its clone: .venv/bin/pip install -e "
        f"'.[{extra}]'"
    )
