"""Rows of data sets, plain text or chats, as documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("messages", "conversations", "text")
"""Where a row's document is looked for, in this order, when no field is named."""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""What ShareGPT calls the roles of a chat; other roles have the usual names."""


def document_of(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, field: str | None = None
) -> str:
    """The document that a row of a data set holds.

    Args:
        row: values by field.
        tokenizer: needed for chats, which its chat template renders.
        field: the one that holds the text or the messages; None is the first of ``FIELDS``, of
            which only ``text`` may hold a text.

    Returns:
        A chat as its template renders it; a text, ended by a blank line.

    Raises:
        ValueError: no such field, something else than text or messages in it, or messages that
            the template cannot render. The message is the end of a sentence that names the row.
    """
    takes_text = field is not None
    if field is None:
        field = next((name for name in FIELDS if row.get(name) is not None), None)
        if field is None:
            raise ValueError(f"has none of {', '.join(FIELDS)}, only {', '.join(row) or 'nothing'}")
        takes_text = field == "text"
    elif field not in row:
        raise ValueError(f"has no field {field!r}, only {', '.join(row)}")
    value = row[field]
    if isinstance(value, str) and takes_text:
        return value + "\n\n"
    if isinstance(value, list):
        return render_chat(value, tokenizer)
    wanted = "text or a list of messages" if takes_text else "a list of messages"
    raise ValueError(f"must have {wanted} in {field!r}, not {_kind(value)}")


def render_chat(turns: Sequence[object], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A chat as the tokenizer's own chat template writes it.

    Args:
        turns: ``{"role": ..., "content": ...}`` or ShareGPT's ``{"from": ..., "value": ...}``.
        tokenizer: with a chat template.

    Raises:
        ValueError: no tokenizer, no template, no messages, or messages that are not of this form
            or that the template refuses.
    """
    from jinja2 import TemplateError

    if tokenizer is None:
        raise ValueError("holds a chat, which needs a tokenizer: load_documents(..., tokenizer=)")
    if tokenizer.chat_template is None:
        raise ValueError(
            "holds a chat, and this model's tokenizer has no chat template to render it with: "
            "set tokenizer.chat_template, use the instruction-tuned model, or give plain "
            'text as {"text": ...}'
        )
    if not turns:
        raise ValueError("has an empty list of messages")
    messages = [_message(turn) for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"has messages that the chat template refuses ({reason})") from error


def read_jsonl(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """The documents of a JSONL file, one object a line; blank lines are skipped.

    Raises:
        ValueError: a line, named by its number, that is not UTF-8, JSON, or a row with a document;
            or a file without any.
    """
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty = False
            try:
                yield document_of(_json_object(line), tokenizer)
            except ValueError as error:
                raise ValueError(f"'{path}', line {number} {error}.") from error
    if empty:
        raise ValueError(f"'{path}' is empty: give a file with text in it.")


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8: convert it first, for instance with iconv") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, not {_kind(row)}")
    return row


def _message(turn: object) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"must have objects as messages, not {_kind(turn)}")
    # Tables give every message all keys that any of them has.
    message = {key: value for key, value in turn.items() if value is not None}
    if "from" in message:
        role, content = message["from"], message.get("value")
        message = {"role": SHAREGPT_ROLES.get(str(role), role), "content": content}
    if not isinstance(message.get("role"), str):
        raise ValueError("has a message without a role")
    if not isinstance(message.get("content"), str | list) and "tool_calls" not in message:
        raise ValueError(f"has a message of the {message['role']} without text")
    return message


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
