"""Text of data sets on the Hugging Face hub, through the ``datasets`` package."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from softtrellis.extras import install
from softtrellis.io.rows import document_of
from softtrellis.io.sources import muted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = "hf:NAME[,CONFIG][:SPLIT[:FIELD]]"
HELD_OUT_SPLITS = ("test", "validation")
MAX_ROWS = 100_000
"""Rows of a data set that are read unless the source says how many."""

_FORM = re.compile(
    r"hf:(?P<name>[^,:\[\]]+)(,(?P<config>[^,:\[\]]+))?"
    r"(:(?P<split>[^,:\[\]]+)(\[:(?P<rows>\d+)\])?(:(?P<field>[^:]+))?)?"
)


@dataclass(frozen=True)
class HubText:
    """A data set as a source names it.

    Attributes:
        name: id on the hub, or a local directory that ``datasets`` can load.
        config: of a data set that has several.
        split: None is "train", and for held-out text "test" or else "validation".
        rows: how many of the split's first rows are taken; None is all.
        field: with text or messages; None is the first of messages, conversations and text.
    """

    name: str
    config: str | None = None
    split: str | None = None
    rows: int | None = None
    field: str | None = None

    @classmethod
    def parse(cls, source: str) -> Self:
        """Reads ``hf:NAME[,CONFIG][:SPLIT[:FIELD]]``, where SPLIT may end in ``[:ROWS]``.

        Raises:
            ValueError: another form, or no rows.
        """
        found = _FORM.fullmatch(source)
        if found is None:
            raise ValueError(
                f"'{source}' must have the form {FORM}, for instance "
                "hf:HuggingFaceFW/fineweb-edu,sample-10BT:train[:20000]:text."
            )
        parts = found.groupdict()
        rows = None if parts["rows"] is None else int(parts["rows"])
        if rows == 0:
            raise ValueError(f"'{source}' must take at least one row.")
        return cls(parts["name"], parts["config"], parts["split"], rows, parts["field"])


def hub_documents(
    source: str, *, held_out: bool, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    """The documents of a data set, a row each, streamed: rows that nobody takes are not fetched.

    Raises:
        ImportError: no ``datasets`` package.
        ConnectionError: no hub can be reached, or there is no such data set there.
        ValueError: no such config, split or field, a row without a document, or more than
            ``MAX_ROWS`` rows where the source does not say how many.
    """
    wanted = HubText.parse(source)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"'{source}' needs the datasets package; {install('data')}, or give the path of a text "
            "file."
        ) from error
    with _loading(source):
        found = load_dataset(wanted.name, wanted.config, split=wanted.split, streaming=True)
    rows = iter(found if wanted.split is not None else _choose(source, found, held_out=held_out))
    for number in itertools.count():
        if number == wanted.rows:
            return
        if wanted.rows is None and number == MAX_ROWS:
            raise ValueError(
                f"'{source}' has more than {MAX_ROWS} rows: say how many to take, as in "
                f"train[:{MAX_ROWS}], or take fewer windows."
            )
        with _loading(source):
            row = next(rows, None)
        if row is None:
            return
        try:
            yield document_of(row, tokenizer, wanted.field)
        except ValueError as error:
            raise ValueError(f"'{source}', row {number} {error}.") from error


def _choose(source: str, splits: Mapping[str, Any], *, held_out: bool) -> Any:
    names = HELD_OUT_SPLITS if held_out else ("train",)
    for name in names:
        if name in splits:
            return splits[name]
    raise ValueError(
        f"'{source}' has no split {' or '.join(names)}, only {', '.join(splits)}: "
        f"name the one to use ({FORM})."
    )


@contextmanager
def _loading(source: str) -> Iterator[None]:
    try:
        with muted("huggingface_hub", "datasets"):
            yield
    except ValueError as error:
        raise ValueError(f"'{source}' cannot be loaded ({_first_line(error)}).") from error
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"'{source}' cannot be loaded ({_first_line(error)}): check the name, the network and, "
            "for data that asks for it, the login; or give the path of a text file."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
