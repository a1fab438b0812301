"""The topics of the interpreter's own help, in a part for training and one that is held out."""

from __future__ import annotations

import hashlib

_HELDOUT_PERCENT = 15
_RUN_WORDS = 10


def pydoc_documents(*, held_out: bool) -> list[str]:
    """The topics of one part, in the order of their names, without what the parts share.

    Raises:
        ImportError: a Python without ``pydoc_data``.
    """
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
