"""Errors of other libraries in our messages."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
