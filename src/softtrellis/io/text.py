"""Loading text and cutting it into windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from softtrellis.io.sources import muted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["calibration", "train", "heldout"]

_HELDOUT_PERCENT = 15
_RUN_WORDS = 10
# Tokens near the end of a cut-off text may differ from those of the whole text.
_PREFIX_MARGIN = 256


def load_documents(sources: Sequence[str], *, split: Split) -> list[str]:
    """Load texts, as a list of documents.

    Args:
        sources: each one of

            - ``"pydoc"``: the topics of the interpreter's own help (``pydoc_data.topics``), in
              the order of their names. A topic is held out when the sha256 of its name, as an
              integer, modulo 100 is below 15; the others are for calibration and training. Topics
              quote each other at length, so passages that share ten words in a row with a
              held-out topic, or with an earlier topic of their own part, are left out.
            - ``"wikitext2"``: WikiText-2 raw through the ``datasets`` package, rows joined by a
              blank line into one document: the test split when held out, else the train split.
            - the path of a UTF-8 text file: the whole file as one document, whatever the split.
        split: "calibration" and "train" are the same texts.

    Raises:
        FileNotFoundError: no such source.
        ValueError: a file that is empty or not UTF-8, or no sources.
        ImportError: "wikitext2" without the ``datasets`` package.
        ConnectionError: "wikitext2" where no hub can be reached.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}.")
    if not sources:
        raise ValueError("No text: give pydoc, wikitext2 or the path of a text file.")
    documents: list[str] = []
    for source in sources:
        if source == "pydoc":
            documents += _pydoc(held_out=split == "heldout")
        elif source == "wikitext2":
            documents.append(_wikitext2("test" if split == "heldout" else "train"))
        else:
            documents.append(_read(source))
    return documents


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
        ValueError: no text, or less than one window of it.
    """
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


def _read(source: str) -> str:
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"'{source}' is a directory: give the text files in it one by one.")
    if not path.is_file():
        raise FileNotFoundError(
            f"No text at '{source}': give pydoc, wikitext2 or the path of a UTF-8 text file."
        )
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{source}' is not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start}): "
            f"convert it first, for instance with iconv."
        ) from None
    if not text.strip():
        raise ValueError(f"'{source}' is empty: give a file with text in it.")
    return text


def _wikitext2(split: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "wikitext2 needs the datasets package: pip install 'softtrellis[data]', or give the "
            "path of a text file."
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


def _pydoc(*, held_out: bool) -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "This Python comes without pydoc_data: give the path of a text file instead."
        ) from error
    ours: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for name, text in sorted(topics.items()):
        if _is_held_out(name) == held_out:
            ours.append(text)
        elif not held_out:
            seen.update(_word_runs(text))
    documents = ["\n\n".join(_unseen_passages(text, seen)) for text in ours]
    return [document for document in documents if document.strip()]


def _is_held_out(topic: str) -> bool:
    return int(hashlib.sha256(topic.encode()).hexdigest(), 16) % 100 < _HELDOUT_PERCENT


def _unseen_passages(text: str, seen: set[tuple[str, ...]]) -> list[str]:
    """Passages of a text that no run of words in `seen` touches; `seen` grows by the text's."""
    passages = text.split("\n\n")
    owners = [i for i, passage in enumerate(passages) for _ in passage.split()]
    runs = _word_runs(text)
    touched: set[int] = set()
    for start, run in enumerate(runs):
        if run in seen:
            touched.update(owners[start : start + _RUN_WORDS])
    seen.update(runs)
    return [passage for i, passage in enumerate(passages) if i not in touched]


def _word_runs(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + _RUN_WORDS]) for i in range(len(words) - _RUN_WORDS + 1)]
