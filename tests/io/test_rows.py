from __future__ import annotations

import json

import pytest

from softtrellis.io.rows import document_of
from softtrellis.io.text import load_documents, stream_documents, token_windows

CHATML = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m['role']) }}"
    "{% endif %}"
    "<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n"
    "{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
]
RENDERED = "<s>system\nBe brief.</s>\n<s>user\nTwo and two?</s>\n<s>assistant\nFour.</s>\n"
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Two and two?"},
    {"from": "gpt", "value": "Four."},
]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    tiny_tokenizer.chat_template = CHATML
    return tiny_tokenizer


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows: object) -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    return write


class TestJsonl:
    @pytest.mark.parametrize("split", ["calibration", "train", "heldout"])
    def test_chats_and_texts(self, tokenizer, jsonl, split):
        rows = [{"messages": CHAT, "id": 7}, {"conversations": SHAREGPT}, "", {"text": "für\u2028"}]
        documents = load_documents([jsonl(*rows)], split=split, tokenizer=tokenizer)
        assert documents == [RENDERED, RENDERED, "für\u2028\n\n"]

    def test_messages_come_before_text(self, tokenizer, jsonl):
        path = jsonl({"text": "as text", "messages": CHAT}, {"messages": None, "text": "only"})
        documents = load_documents([path], split="train", tokenizer=tokenizer)
        assert documents == [RENDERED, "only\n\n"]

    def test_the_templates_special_tokens_are_tokens(self, tokenizer, jsonl):
        documents = load_documents([jsonl({"messages": CHAT})], split="train", tokenizer=tokenizer)
        windows = token_windows(tokenizer, documents, 16)
        first = [tokenizer.bos_token_id, *tokenizer("system\nBe brief.").input_ids]
        assert windows.flatten()[: len(first)].tolist() == first
        assert tokenizer.eos_token_id in windows

    def test_texts_need_no_tokenizer(self, jsonl):
        assert load_documents([jsonl({"text": "a"})], split="train") == ["a\n\n"]

    def test_rows_that_nobody_takes_are_not_read(self, tiny_tokenizer, jsonl):
        path = jsonl({"text": "a" * 40}, "not JSON")
        documents = stream_documents([path], split="train")
        assert token_windows(tiny_tokenizer, documents, 10, limit=4).shape == (4, 10)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("{'text': 'a'}", r"line 2 is not JSON \(.* at column 2\)\."),
            ("[1]", "line 2 must be a JSON object, not a list"),
            (
                {"prompt": "a", "chosen": "b"},
                "line 2 has none of messages, .*, only prompt, chosen",
            ),
            ({}, "line 2 has none of messages, conversations, text, only nothing"),
            ({"text": 3}, "line 2 must have text or a list of messages in 'text', not a number"),
            ({"messages": {}}, "line 2 must have a list of messages in 'messages', not an object"),
            ({"messages": "x"}, "line 2 must have a list of messages in 'messages', not a string"),
            ({"conversations": "x", "text": "y"}, "line 2 must have a list of messages in 'conv"),
            ({"messages": []}, "line 2 has an empty list of messages"),
            ({"messages": ["hi"]}, "line 2 must have objects as messages, not a string"),
            ({"messages": [{"content": "a"}]}, "line 2 has a message without a role"),
            ({"messages": [{"role": "user"}]}, "line 2 has a message of the user without text"),
            (
                {"conversations": [{"from": "critic", "value": "no"}]},
                r"line 2 has messages that the chat template refuses \(no role critic\)",
            ),
        ],
    )
    def test_bad_lines(self, tokenizer, jsonl, row, message):
        path = jsonl({"text": "good"}, row, {"text": "good"})
        with pytest.raises(ValueError, match=rf"rows\.jsonl', {message}"):
            load_documents([path], split="train", tokenizer=tokenizer)

    def test_not_utf8(self, tmp_path):
        path = tmp_path / "latin.jsonl"
        path.write_bytes('{"text": "a"}\n{"text": "naïve"}\n'.encode("latin-1"))
        with pytest.raises(ValueError, match=r"line 2 is not UTF-8"):
            load_documents([str(path)], split="train")

    def test_empty(self, jsonl):
        with pytest.raises(ValueError, match=r"rows\.jsonl' is empty"):
            load_documents([jsonl("", "  ")], split="train")

    def test_no_template(self, tiny_tokenizer, jsonl):
        tiny_tokenizer.chat_template = None
        with pytest.raises(ValueError, match=r"line 1 holds a chat, .*set tokenizer\.chat_templ"):
            load_documents([jsonl({"messages": CHAT})], split="train", tokenizer=tiny_tokenizer)

    def test_no_tokenizer(self, jsonl):
        with pytest.raises(ValueError, match=r"line 1 holds a chat, which needs a tokenizer"):
            load_documents([jsonl({"messages": CHAT})], split="train")

    def test_missing_is_said_at_once(self, jsonl):
        with pytest.raises(FileNotFoundError, match=r"No text at 'no-such\.jsonl'"):
            stream_documents([jsonl({"text": "a"}), "no-such.jsonl"], split="train")


class TestDocumentOf:
    def test_named_field(self, tokenizer):
        row = {"text": "a", "body": "b", "dialogue": SHAREGPT}
        assert document_of(row, None, "body") == "b\n\n"
        assert document_of(row, tokenizer, "dialogue") == RENDERED
        with pytest.raises(ValueError, match="no field 'title', only text, body, dialogue"):
            document_of(row, None, "title")

    def test_keys_that_a_table_fills_with_null(self, tokenizer):
        row = {"messages": [{**message, "tool_calls": None, "name": None} for message in CHAT]}
        assert document_of(row, tokenizer) == RENDERED
