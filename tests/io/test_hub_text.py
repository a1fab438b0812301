from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from softtrellis.io import hub_text
from softtrellis.io.hub_text import HubText
from softtrellis.io.text import load_documents, stream_documents, token_windows


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:imdb", HubText("imdb")),
        ("hf:org/name,cfg-1", HubText("org/name", "cfg-1")),
        ("hf:org/name:validation", HubText("org/name", split="validation")),
        ("hf:org/name,c:train:body", HubText("org/name", "c", "train", field="body")),
        ("hf:org/name:train[:50]", HubText("org/name", split="train", rows=50)),
        ("hf:org/name:train[:50]:a b", HubText("org/name", None, "train", 50, "a b")),
    ],
)
def test_forms(source, expected):
    assert HubText.parse(source) == expected


@pytest.mark.parametrize(
    "source",
    ["hf:", "hf:,c", "hf:a:", "hf:a:train[10:]", "hf:a:train[:5%]", "hf:a:[:5]", "hf:a::f"],
)
def test_other_forms_are_refused(source):
    with pytest.raises(ValueError, match=r"must have the form hf:NAME\[,CONFIG\]"):
        load_documents([source], split="train")


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        load_documents(["hf:a:train[:0]"], split="train")


@pytest.fixture
def hub(monkeypatch):
    """A hub of one data set with three splits, and how many rows of it were fetched."""
    fetched = []

    def rows(split: str) -> Iterator[dict[str, str]]:
        for i in range(1000):
            fetched.append(i)
            yield {"text": f"{split} {i}", "title": f"title {i}"}

    def load_dataset(
        name: str, config: str | None, *, split: str | None, streaming: bool
    ) -> object:
        assert (name, config, streaming) == ("org/name", "cfg", True)
        splits = {part: rows(part) for part in ("train", "test", "validation")}
        return splits if split is None else splits[split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return fetched


class TestRows:
    @pytest.mark.parametrize(
        ("split", "part"), [("train", "train"), ("calibration", "train"), ("heldout", "test")]
    )
    def test_the_split_of_the_purpose(self, hub, split, part):
        documents = load_documents(["hf:org/name,cfg"], split=split)
        assert documents == [f"{part} {i}\n\n" for i in range(1000)]

    @pytest.mark.parametrize("split", ["train", "heldout"])
    def test_a_named_split_is_taken_for_every_purpose(self, hub, split):
        documents = load_documents(["hf:org/name,cfg:validation[:2]:title"], split=split)
        assert documents == ["title 0\n\n", "title 1\n\n"]
        assert hub == [0, 1]

    def test_only_rows_that_are_taken_are_fetched(self, hub, tiny_tokenizer):
        documents = stream_documents(["hf:org/name,cfg"], split="train")
        assert hub == []
        assert token_windows(tiny_tokenizer, documents, 8, limit=3).shape == (3, 8)
        assert len(hub) == 3

    def test_too_many_rows(self, hub, monkeypatch):
        monkeypatch.setattr(hub_text, "MAX_ROWS", 999)
        with pytest.raises(ValueError, match=r"more than 999 rows: .* train\[:999\]"):
            load_documents(["hf:org/name,cfg"], split="train")
        assert len(load_documents(["hf:org/name,cfg:train[:1000]"], split="train")) == 1000

    def test_no_such_field(self, hub):
        with pytest.raises(ValueError, match=r"row 0 has no field 'body', only text, title"):
            load_documents(["hf:org/name,cfg:train:body"], split="train")


class TestErrors:
    def test_no_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"\.venv/bin/pip install -e '\.\[data\]'"):
            load_documents(["hf:a"], split="heldout")

    @pytest.mark.parametrize(
        ("error", "kind", "message"),
        [
            (ConnectionError("no route\nto it"), ConnectionError, r"\(no route\): check the name"),
            (FileNotFoundError("no 'a'."), ConnectionError, r"\(no 'a'\): check the name"),
            (ValueError("no config 'x'"), ValueError, r"'hf:a' cannot be loaded \(no config 'x'\)"),
        ],
    )
    def test_not_loaded(self, monkeypatch, error, kind, message):
        def load_dataset(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        with pytest.raises(kind, match=message):
            load_documents(["hf:a"], split="train")

    def test_connection_lost_on_the_way(self, monkeypatch):
        def rows() -> Iterator[dict[str, str]]:
            yield {"text": "one"}
            raise ConnectionError("reset")

        fake = SimpleNamespace(load_dataset=lambda *_, **__: rows())
        monkeypatch.setitem(sys.modules, "datasets", fake)
        documents = stream_documents(["hf:a:train"], split="train")
        assert next(documents) == "one\n\n"
        with pytest.raises(ConnectionError, match="reset"):
            next(documents)

    def test_no_split_for_the_purpose(self, monkeypatch):
        fake = SimpleNamespace(load_dataset=lambda *_, **__: {"train": [], "dev": []})
        monkeypatch.setitem(sys.modules, "datasets", fake)
        with pytest.raises(ValueError, match="no split test or validation, only train, dev: name"):
            load_documents(["hf:a"], split="heldout")


class TestWithThePackage:
    """A local folder in the place of a data set on the hub."""

    @pytest.fixture
    def folder(self, tmp_path):
        pytest.importorskip("datasets")
        for part in ("train", "validation"):
            rows = [{"text": f"{part} {i}", "n": i} for i in range(5)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        return tmp_path

    @pytest.mark.parametrize(("split", "part"), [("train", "train"), ("heldout", "validation")])
    def test_splits(self, folder, split, part):
        expected = [f"{part} {i}\n\n" for i in range(5)]
        assert load_documents([f"hf:{folder}"], split=split) == expected
        assert load_documents([f"hf:{folder}:{part}[:2]:text"], split="train") == expected[:2]

    def test_errors(self, folder):
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_documents([f"hf:{folder}:dev"], split="train")
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_documents([f"hf:{folder},other"], split="train")
        with pytest.raises(ConnectionError, match="no-such/data-set' cannot be loaded"):
            load_documents(["hf:no-such/data-set"], split="train")
        with pytest.raises(ValueError, match=r"row 0 must have text .* not a number"):
            load_documents([f"hf:{folder}:train:n"], split="train")
