from __future__ import annotations

import json

import pytest
import torch

from softtrellis.io.text import (
    hold_out,
    load_documents,
    token_windows,
    train_and_held_out_windows,
)


class TestDocumentsOfATextFile:
    def test_blank_lines_part_them(self, tmp_path):
        text = "\n\none\ntwo\n\nthree\n\n\n\nfour \n \nfive\n"
        path = tmp_path / "text.txt"
        path.write_text(text, encoding="utf-8")
        documents = load_documents([f"documents:{path}"], split="train")
        assert documents == ["one\ntwo\n\n", "three\n\n\n\n", "four \n \nfive\n"]
        assert load_documents([str(path)], split="train") == [text]

    def test_line_ends_of_windows(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_bytes(b"one\r\n\r\ntwo\r\n")
        assert load_documents([f"documents:{path}"], split="train") == ["one\n\n", "two\n"]

    def test_missing(self):
        with pytest.raises(FileNotFoundError, match=r"No text at 'no-such\.txt'"):
            load_documents(["documents:no-such.txt"], split="train")

    def test_train_txt(self, shared_data):
        path = shared_data / "train.txt"
        documents = load_documents([f"documents:{path}"], split="train")
        assert len(documents) == 6522
        assert "".join(documents) == path.read_text(encoding="utf-8")
        training, held_out = hold_out(documents, 256)
        assert (len(training), held_out) == (6522 - 256, documents[-256:])


class TestHoldOut:
    @pytest.mark.parametrize(
        ("documents", "count", "expected"), [(100, 4, 4), (100, 10, 10), (39, 256, 3), (10, 2, 1)]
    )
    def test_the_last_documents(self, documents, count, expected):
        texts = [str(i) for i in range(documents)]
        assert hold_out(texts, count) == (texts[:-expected], texts[-expected:])

    def test_the_end_of_few_documents(self):
        texts = ["a word " * 100, "und noch eins " * 50, ""]
        training, held_out = hold_out(texts, 256)
        assert [a + b for a, b in zip(training, held_out, strict=True)] == texts
        assert len(held_out[0]) == pytest.approx(70, abs=7)
        assert len(held_out[1]) == pytest.approx(70, abs=7)
        assert all(text.startswith(" ") for text in held_out[:2])

    def test_a_text_without_spaces(self):
        assert hold_out(["文" * 50], 1) == (["文" * 45], ["文" * 5])

    def test_bad_count(self):
        with pytest.raises(ValueError, match="held_out_documents must be at least 1, got 0"):
            hold_out(["text"], 0)


class TestWindows:
    @pytest.fixture
    def rows(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        lines = [json.dumps({"text": f"this is row number {i:03d}"}) for i in range(100)]
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    def test_parts_share_no_document(self, tiny_tokenizer, rows):
        windows, held_out = train_and_held_out_windows(
            tiny_tokenizer, [rows], 24, held_out_documents=5
        )
        documents = load_documents([rows], split="train")
        assert windows.dtype == held_out.dtype == torch.int64
        assert torch.equal(windows, token_windows(tiny_tokenizer, documents[:95], 24))
        assert torch.equal(held_out, token_windows(tiny_tokenizer, documents[95:], 24))

    def test_limits_take_the_first(self, tiny_tokenizer, rows):
        windows, held_out = train_and_held_out_windows(tiny_tokenizer, [rows], 24)
        fewer = train_and_held_out_windows(tiny_tokenizer, [rows], 24, limit=3, held_out_windows=2)
        assert torch.equal(fewer[0], windows[:3])
        assert torch.equal(fewer[1], held_out[:2])

    def test_every_source_gives_its_end(self, tiny_tokenizer, rows, tmp_path):
        book = tmp_path / "book.txt"
        book.write_text("x " * 500, encoding="utf-8")
        windows, held_out = train_and_held_out_windows(
            tiny_tokenizer, [rows, str(book)], 10, held_out_documents=1
        )
        text = "".join(tiny_tokenizer.batch_decode(held_out))
        assert text.startswith("this is row number 099")
        assert text.rstrip("x ").endswith("099\n\n")
        assert held_out.numel() == pytest.approx(24 + 100, abs=10)
        assert windows.numel() == pytest.approx(99 * 24 + 900, abs=10)

    def test_pydoc(self, tiny_tokenizer):
        windows, held_out = train_and_held_out_windows(tiny_tokenizer, ["pydoc"], 64)
        assert len(windows) > len(held_out) > 20

    def test_held_out_part_too_short(self, tiny_tokenizer, tmp_path):
        path = tmp_path / "short.txt"
        path.write_text("word " * 20, encoding="utf-8")
        with pytest.raises(
            ValueError, match=r"--held-out 0 .*: The text has .* less than one window of 32"
        ):
            train_and_held_out_windows(tiny_tokenizer, [str(path)], 32)


def test_teacher_is_not_loaded():
    with pytest.raises(ValueError, match="'teacher' is sampled from the model"):
        load_documents(["pydoc", "teacher"], split="train")
