"""Loading text and cutting it into windows of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from softtrellis.extras import install
from softtrellis.io.hub_text import HubText, hub_documents
from softtrellis.io.pydoc_topics import pydoc_documents
from softtrellis.io.rows import read_jsonl
from softtrellis.io.sources import muted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "train", "heldout"]

TEACHER = "teacher"
"""The source that is not loaded but sampled from a model, see ``recipes.teacher_text``."""

DOCUMENTS = "documents:"
"""Before the path of a text file that has a blank line, or several, between its documents."""

HELD_OUT_SHARE = 0.1
"""Of the documents, or of the text where there are few documents, that is held out at most."""

HELD_OUT_DOCUMENTS = 256
"""The last documents of a source that are held out, see ``hold_out``."""

_FORMS = "pydoc, wikitext2, hf:NAME or the path of a UTF-8 text or .jsonl file"
# Tokens near the end of a cut-off text may differ from those of the whole text.
_PREFIX_MARGIN = 256


def load_documents(
    sources: Sequence[str], *, split: Split, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    """Load texts, as a list of documents; see :func:`stream_documents`."""
    return list(stream_documents(sources, split=split, tokenizer=tokenizer))


def stream_documents(
    sources: Sequence[str], *, split: Split, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[str]:
    """Load texts one document after the other, so that what nobody takes is not read.

    Args:
        sources: each one of

            - ``"pydoc"``: the topics of the interpreter's own help (``pydoc_data.topics``), in
              the order of their names. A topic is held out when the sha256 of its name, as an
              integer, modulo 100 is below 15; the others are for calibration and training. Topics
              quote each other at length, so passages that share ten words in a row with a
              held-out topic, or with an earlier topic of their own part, are left out.
            - ``"wikitext2"``: WikiText-2 raw through the ``datasets`` package, rows joined by a
              blank line into one document: the test split when held out, else the train split.
            - ``"hf:NAME[,CONFIG][:SPLIT[:FIELD]]"``: a data set on the Hugging Face hub, streamed
              through the ``datasets`` package, a document a row; see ``HubText``. Without SPLIT it
              is "test", or else "validation", when held out, and "train" otherwise.
            - the path of a UTF-8 text file: the whole file as one document, whatever the split.
            - ``"documents:PATH"``: a text file whose documents have blank lines between them. Each
              keeps those that follow it, so that together they are still the file.
            - the path of a ``.jsonl`` file, whatever the split: one object a line, with a chat in
              ``messages`` or ``conversations``, or a text in ``text``; see ``document_of``.
        split: "calibration" and "train" are the same texts.
        tokenizer: its chat template renders chats.

    Raises:
        FileNotFoundError: no such source; at once, whatever is taken.
        ValueError: a file that is empty or not UTF-8, a row without a document (named by its
            line), a chat without a tokenizer or a chat template, or no sources.
        ImportError: "wikitext2" or "hf:..." without the ``datasets`` package.
        ConnectionError: these two where no hub can be reached.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}.")
    if not sources:
        raise ValueError(f"No text: give {_FORMS}.")
    for source in sources:
        _check(source)
    held_out = split == "heldout"
    return chain.from_iterable(_documents(s, held_out, tokenizer) for s in sources)


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    ctx: int,
    *,
    limit: int | None = None,
) -> Tensor:
    """Tokenize documents without special tokens, concatenate, and cut into full windows.

    Args:
        tokenizer: a Hugging Face tokenizer.
        documents: texts; nothing is put between them.
        ctx: tokens per window, at least 2. What is left over at the end is dropped.
        limit: at most so many windows, from the start; text beyond them is not tokenized.

    Returns:
        int64 [n, ctx], n at least 1.

    Raises:
        TypeError: one string, which would be read as a document for every letter.
        ValueError: no text, or less than one window of it.
    """
    if isinstance(documents, str):
        raise TypeError("documents must be a list of texts, got one string; put it into a list")
    if ctx < 2:
        raise ValueError(f"ctx must be at least 2 tokens, got {ctx}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 window, got {limit}.")
    wanted = None if limit is None else limit * ctx
    tokens: list[int] = []
    for document in documents:
        tokens += _encode(tokenizer, document, None if wanted is None else wanted - len(tokens))
        if wanted is not None and len(tokens) >= wanted:
            break
    if not tokens:
        raise ValueError("There is no text: every document is empty.")
    count = min(len(tokens), wanted or len(tokens)) // ctx
    if count == 0:
        raise ValueError(
            f"The text has {len(tokens)} tokens, less than one window of {ctx}: give more text "
            f"or a smaller ctx."
        )
    return torch.tensor(tokens[: count * ctx], dtype=torch.int64).view(count, ctx)


def hold_out(documents: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Part the documents of one source into those to train on and those to choose settings by.

    Held out are the last ``count`` documents, but at most a tenth of all. Where that is none, as
    with a book in one document, it is the last tenth of each document, from a space on.

    Args:
        documents: in a fixed order.
        count: at least 1.

    Returns:
        (training, held out), which share nothing and have the order of ``documents``.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"held_out_documents must be at least 1, got {count}.")
    last = min(count, int(len(documents) * HELD_OUT_SHARE))
    if last:
        return list(documents[:-last]), list(documents[-last:])
    cuts = [_space_after(text, int(len(text) * (1 - HELD_OUT_SHARE))) for text in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return [text[:cut] for text, cut in pairs], [text[cut:] for text, cut in pairs]


def train_and_held_out_documents(
    sources: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    held_out_documents: int = HELD_OUT_DOCUMENTS,
) -> tuple[list[str], list[str]]:
    """Both parts of every source, see ``hold_out``; raises what ``stream_documents`` raises."""
    training: list[str] = []
    held_out: list[str] = []
    for documents in [load_documents([s], split="train", tokenizer=tokenizer) for s in sources]:
        ours, others = hold_out(documents, held_out_documents)
        training += ours
        held_out += others
    return training, held_out


def train_and_held_out_windows(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    ctx: int,
    *,
    limit: int | None = None,
    held_out_documents: int = HELD_OUT_DOCUMENTS,
    held_out_windows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Windows to train on, and windows of the same sources that are never trained on.

    Learning rates, temperatures and checkpoints are chosen on the second; neither is for reporting.
    What is held out of a source does not depend on ``ctx`` or ``limit``.

    Args:
        tokenizer: a Hugging Face tokenizer.
        sources: see ``stream_documents``; their part for training is read whole.
        ctx: tokens per window, at least 2.
        limit: at most so many windows to train on, from the start.
        held_out_documents: the last documents of each source that are held out, see ``hold_out``.
        held_out_windows: at most so many of them, from the start.

    Returns:
        int64 [n, ctx] and int64 [m, ctx], n and m at least 1.

    Raises:
        ValueError: less than one window of either; and what ``stream_documents`` raises.
    """
    training, held_out = train_and_held_out_documents(
        sources, tokenizer=tokenizer, held_out_documents=held_out_documents
    )
    part = "trained on"
    try:
        windows = token_windows(tokenizer, training, ctx, limit=limit)
        part = "held out (--held-out 0 holds out none)"
        return windows, token_windows(tokenizer, held_out, ctx, limit=held_out_windows)
    except ValueError as error:
        raise ValueError(f"Of the part that is {part}: {error}") from error


def _encode(tokenizer: PreTrainedTokenizerBase, document: str, wanted: int | None) -> list[int]:
    """Tokens of a document; with `wanted`, at least so many if it has them."""
    length = len(document) if wanted is None else 8 * (wanted + _PREFIX_MARGIN)
    while True:
        tokens: list[int] = tokenizer(
            document[:length], add_special_tokens=False, verbose=False
        ).input_ids
        if wanted is None or length >= len(document):
            return tokens
        if len(tokens) >= wanted + _PREFIX_MARGIN:
            return tokens[:wanted]
        length *= 2


def _space_after(text: str, start: int) -> int:
    """Where a space begins at or after a position, or the position if there is none."""
    space = re.compile(r"\s").search(text, start)
    return start if space is None else space.start()


def _check(source: str) -> None:
    """Raises unless the source has a known form and, as a path, exists."""
    if source == TEACHER:
        raise ValueError(
            f"'{TEACHER}' is sampled from the model, where that is trained or calibrated: here, "
            f"give {_FORMS}."
        )
    if source.startswith("hf:"):
        HubText.parse(source)
    path = path_of(source)
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"'{path}' is a directory: give the text files in it one by one.")
    if not path.is_file():
        raise FileNotFoundError(f"No text at '{path}': give {_FORMS}.")


def path_of(source: str) -> Path | None:
    """The file that a source of text names, whether or not it exists; None for other sources."""
    if source in ("pydoc", "wikitext2", TEACHER) or source.startswith("hf:"):
        return None
    return Path(source.removeprefix(DOCUMENTS))


def _documents(
    source: str, held_out: bool, tokenizer: PreTrainedTokenizerBase | None
) -> Iterable[str]:
    if source == "pydoc":
        return pydoc_documents(held_out=held_out)
    if source == "wikitext2":
        return [_wikitext2("test" if held_out else "train")]
    path = path_of(source)
    if path is None:
        return hub_documents(source, held_out=held_out, tokenizer=tokenizer)
    if path.suffix == ".jsonl":
        return read_jsonl(path, tokenizer)
    text = _read(path)
    return _parted_by_blank_lines(text) if source.startswith(DOCUMENTS) else [text]


def _parted_by_blank_lines(text: str) -> list[str]:
    pieces = re.split(r"(?<=\n\n)(?=[^\n])", text.replace("\r\n", "\n"))
    return [piece for piece in pieces if piece.strip()]


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}' is not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start}): "
            f"convert it first, for instance with iconv."
        ) from None
    if not text.strip():
        raise ValueError(f"'{path}' is empty: give a file with text in it.")
    return text


def _wikitext2(split: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"wikitext2 needs the datasets package; {install('data')}, or give the path of a text "
            "file."
        ) from error
    try:
        with muted("huggingface_hub", "datasets"):
            rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            "wikitext2 cannot be loaded because no hub can be reached: check the network, or give "
            "the path of a text file."
        ) from error
    return "\n\n".join(rows)
