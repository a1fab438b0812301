"""What the library logs, as lines of a command."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Lines(logging.Handler):
    """Writes records to standard error, on lines of their own above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        try:
            tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)
        except OSError:
            self.handleError(record)


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Inside the ``with`` statement, the library's warnings are lines "warning: ..."."""
    logger, handler = logging.getLogger("softtrellis"), _Lines(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
