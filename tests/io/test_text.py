from __future__ import annotations

import hashlib
import sys
from types import SimpleNamespace

import pytest
import torch

from softtrellis.io.text import load_documents, token_windows


def word_runs(documents: list[str], length: int = 10) -> set[str]:
    runs = set()
    for document in documents:
        words = document.split()
        runs |= {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}
    return runs


class TestPydoc:
    def test_parts_have_text_and_share_none(self):
        calibration = load_documents(["pydoc"], split="calibration")
        held_out = load_documents(["pydoc"], split="heldout")
        assert sum(map(len, calibration)) > 200_000
        assert sum(map(len, held_out)) > 30_000
        assert not word_runs(calibration) & word_runs(held_out)

    def test_calibration_is_train(self):
        calibration = load_documents(["pydoc"], split="calibration")
        assert calibration == load_documents(["pydoc"], split="train")

    @pytest.mark.parametrize("split", ["train", "heldout"])
    def test_topics_of_a_part_share_none(self, split):
        seen: set[str] = set()
        for document in load_documents(["pydoc"], split=split):
            runs = word_runs([document])
            assert not runs & seen
            seen |= runs

    def test_a_topic_goes_by_its_name(self, monkeypatch):
        texts = {f"topic {i}": f"text of topic {i}" for i in range(1000)}
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", SimpleNamespace(topics=texts))
        held_out = load_documents(["pydoc"], split="heldout")
        assert len(held_out) == pytest.approx(150, abs=40)
        assert sorted(held_out + load_documents(["pydoc"], split="train")) == sorted(texts.values())
        for name, text in texts.items():
            number = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
            assert (text in held_out) == (number % 100 < 15)

    def test_python_without_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(ImportError, match="pydoc_data"):
            load_documents(["pydoc"], split="train")


class TestWikitext2:
    @pytest.mark.parametrize(("split", "part"), [("heldout", "test"), ("train", "train")])
    def test_splits(self, monkeypatch, split, part):
        def load_dataset(name: str, config: str, *, split: str) -> dict[str, list[str]]:
            assert (name, config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
            return {"text": ["", f" = {split} = \n"]}

        fake = SimpleNamespace(load_dataset=load_dataset)
        monkeypatch.setitem(sys.modules, "datasets", fake)
        assert load_documents(["wikitext2"], split=split) == [f"\n\n = {part} = \n"]

    def test_no_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"\.venv/bin/pip install -e '\.\[data\]'"):
            load_documents(["wikitext2"], split="heldout")

    def test_no_hub(self, monkeypatch):
        def load_dataset(*_: object, **__: object) -> None:
            raise ConnectionError("Couldn't reach it")

        fake = SimpleNamespace(load_dataset=load_dataset)
        monkeypatch.setitem(sys.modules, "datasets", fake)
        with pytest.raises(ConnectionError, match="check the network"):
            load_documents(["wikitext2"], split="heldout")


class TestFiles:
    @pytest.mark.parametrize("split", ["calibration", "train", "heldout"])
    def test_whole_file_unmodified(self, tmp_path, split):
        texts = ["one\r\n\n\ntwo \n", "\ufeffdrei – fünf\n\n"]
        paths = []
        for i, text in enumerate(texts):
            paths.append(str(tmp_path / f"{i}.txt"))
            (tmp_path / f"{i}.txt").write_bytes(text.encode())
        assert load_documents(paths, split=split) == texts

    def test_not_utf8(self, tmp_path):
        path = tmp_path / "latin.txt"
        path.write_bytes("naïve".encode("latin-1"))
        with pytest.raises(ValueError, match=r"latin\.txt' is not UTF-8 \(byte 0xef at position 2"):
            load_documents([str(path)], split="train")

    @pytest.mark.parametrize("content", [b"", b" \n\t\n"])
    def test_empty(self, tmp_path, content):
        path = tmp_path / "empty.txt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"empty\.txt' is empty"):
            load_documents([str(path)], split="train")

    def test_missing(self):
        with pytest.raises(FileNotFoundError, match=r"No text at 'no-such\.txt'"):
            load_documents(["no-such.txt"], split="train")

    def test_directory(self, tmp_path):
        with pytest.raises(ValueError, match="directory"):
            load_documents([str(tmp_path)], split="train")

    def test_no_sources(self):
        with pytest.raises(ValueError, match="No text"):
            load_documents([], split="train")

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="calibration, train, heldout"):
            load_documents(["pydoc"], split="test")  # type: ignore[arg-type]


class TestTokenWindows:
    def test_documents_are_concatenated(self, tiny_tokenizer):
        windows = token_windows(tiny_tokenizer, ["abc", "", "defgh", "ijk"], 4)
        assert windows.dtype == torch.int64
        expected = tiny_tokenizer("abcdefgh").input_ids
        assert windows.tolist() == [expected[:4], expected[4:]]

    def test_one_string_is_no_list_of_documents(self, tiny_tokenizer):
        with pytest.raises(TypeError, match="put it into a list"):
            token_windows(tiny_tokenizer, "some words of a text", 4)

    @pytest.mark.parametrize("limit", [1, 2, 3, 99])
    def test_limit_takes_the_first(self, tiny_tokenizer, limit):
        documents = ["some words. ", "and more of them"]
        windows = token_windows(tiny_tokenizer, documents, 5)
        assert torch.equal(
            token_windows(tiny_tokenizer, documents, 5, limit=limit), windows[:limit]
        )

    def test_limit_on_a_long_document(self, stories260k, shared_data):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(stories260k)
        documents = load_documents([str(shared_data / "tinystories.txt")], split="heldout")
        windows = token_windows(tokenizer, documents, 128)
        assert tokenizer.bos_token_id not in windows
        for limit in (1, 7, 150):
            assert torch.equal(
                token_windows(tokenizer, documents, 128, limit=limit), windows[:limit]
            )

    def test_text_beyond_the_limit_is_not_tokenized(self, tiny_tokenizer):
        def documents():
            yield "a" * 1_000_000
            raise AssertionError("went on to the next document")

        lengths = []

        def tokenizer(text: str, **options: object) -> object:
            lengths.append(len(text))
            return tiny_tokenizer(text, **options)

        token_windows(tokenizer, documents(), 10, limit=2)  # type: ignore[arg-type]
        assert max(lengths) < 5000

    def test_limit_with_long_tokens(self):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = {f"{i:040d}": i for i in range(2000)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="0" * 40))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        windows = token_windows(fast, [" ".join(words)], 100, limit=5)
        assert windows.flatten().tolist() == list(range(500))

    def test_shorter_than_one_window(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="7 tokens, less than one window of 8"):
            token_windows(tiny_tokenizer, ["seven", "!!"], 8)
        with pytest.raises(ValueError, match="7 tokens, less than one window of 8"):
            token_windows(tiny_tokenizer, ["seven", "!!"], 8, limit=3)

    @pytest.mark.parametrize("documents", [[], [""]])
    def test_no_text(self, tiny_tokenizer, documents):
        with pytest.raises(ValueError, match="no text"):
            token_windows(tiny_tokenizer, documents, 8)

    @pytest.mark.parametrize("options", [{"ctx": 1}, {"ctx": 4, "limit": 0}])
    def test_bad_sizes(self, tiny_tokenizer, options):
        with pytest.raises(ValueError, match="must be at least"):
            token_windows(tiny_tokenizer, ["text"], **options)

    def test_wikitext2_in_smollm2_tokens(self, smollm2_source, shared_data):
        documents = load_documents([str(shared_data / "wikitext2_test.txt")], split="heldout")
        tokens = smollm2_source.tokenizer(documents[0], add_special_tokens=False).input_ids
        assert len(tokens) == 304_978
        assert token_windows(smollm2_source.tokenizer, documents, 2048).shape == (148, 2048)
