"""Errors of other libraries in our messages."""

from __future__ import annotations

import errno

DAMAGED = (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError)
"""What JSON with other values than expected makes our readers raise."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_disk_full(error: BaseException) -> bool:
    """Whether there is no room for a file: on the disk, in a quota or under a limit of its size."""
    # Writers in Rust raise errors of their own kinds, with the system's number in the text.
    numbers = (f"os error {number})" for number in _FULL)
    return getattr(error, "errno", None) in _FULL or any(text in str(error) for text in numbers)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the machine's or a device's."""
    text = str(error).lower()
    phrases = ("can't allocate memory", "out of memory", "out_of_memory")
    return isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)
