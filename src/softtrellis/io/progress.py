"""The progress bar that every long step shows."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar, overload

from tqdm.auto import tqdm

T = TypeVar("T")


@overload
def progress(items: int, description: str, *, enabled: bool = True) -> tqdm[Any]: ...
@overload
def progress(items: Iterable[T], description: str, *, enabled: bool = True) -> tqdm[T]: ...
def progress(items: Iterable[T] | int, description: str, *, enabled: bool = True) -> tqdm[Any]:
    """Show how far a loop is and how long it will still take, on standard error.

    Args:
        items: what to iterate over; or, as an integer, the number of steps of a bar that the
            caller moves with ``.update(n)``, best inside a ``with``; 0 if that is not known.
        description: what is being done, in a word or two.
        enabled: False gives the same object without any output.
    """
    total, iterable = (items or None, None) if isinstance(items, int) else (None, items)
    # A log file gets a line now and then instead of ten a second.
    pause = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        iterable,
        desc=description,
        total=total,
        disable=not enabled,
        file=sys.stderr,
        mininterval=pause,
        dynamic_ncols=True,
    )
