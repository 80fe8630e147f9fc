"""psannLMDataPrep: from texts and files to examples; bad input is refused in words that help."""

from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest
from psann_fast.data import IGNORED, default_corpus, psannLMDataPrep, train_tokenizer
from psann_fast.data.documents import split_documents

TWO = ["hello world", "goodnight moon"]


def text_of(dp: psannLMDataPrep, examples) -> str:
    """What the targets of all examples say, end to end, with | for the separator."""
    targets = examples.batch(np.arange(len(examples)))["targets"].flatten()
    targets = targets[targets != IGNORED].numpy()
    parts, start = [], 0
    for place in np.flatnonzero(targets == dp.eos_id):
        parts.append(dp.tokenizer.decode(targets[start:place]))
        start = place + 1
    return "|".join(parts)


@pytest.mark.parametrize("name", ["auto", "simple", "sentencepiece", "tokenizers"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_quickstart_gives_examples(name, packed, caplog):
    dp = psannLMDataPrep(TWO, tokenizer=name, tokenizer_model_path=None, max_length=256, pack_sequences=packed)
    assert len(dp) == len(dp.dataset) == (1 if packed else 2)
    assert text_of(dp, dp.dataset) == "hello world|goodnight moon"
    assert "the training text has" if packed else "the longest document of the training text has" in caplog.text
    assert dp.vocab_size == dp.tokenizer.vocab_size and dp.pad_id == dp.tokenizer.pad_id and dp.eos_id == dp.tokenizer.eos_id
    assert dp.tokenizer_backend == ("sentencepiece" if name == "auto" else name)
    assert dp.val_dataset is None and dp.val_texts == [] and dp.val_tokens == dp.val_bytes == 0
    assert dp.train_bytes == 25 and dp.train_tokens == dp.dataset.target_tokens
    assert set(dp.used_ids.tolist()) == {dp.eos_id, *dp.tokenizer.encode(TWO[0]), *dp.tokenizer.encode(TWO[1])}
    assert "2 examples" in repr(dp) or "1 examples" in repr(dp)


def test_the_default_corpus_comes_back_from_its_examples():
    corpus = default_corpus()
    assert len(corpus) > 70 and sum(map(len, corpus)) > 400_000 and corpus == default_corpus()
    dp = psannLMDataPrep(corpus, max_length=128)
    assert text_of(dp, dp.dataset) == "|".join(corpus)
    assert dp.train_tokens == sum(map(len, dp.tokenizer.encode_batch(corpus))) + len(corpus)
    assert dp.train_bytes == sum(len(text.encode()) for text in corpus)
    assert dp.vocab_size == 4096 == dp.config.tokenizer_vocab_size


# ---- the split


def test_one_document_is_split_as_nanogpt_splits():
    draw = random.Random(0)
    text = "".join(draw.choices("abcdefgh \n", k=11_153))
    dp = psannLMDataPrep([text], tokenizer="simple", max_length=64, val_split=0.1)
    place = int(0.9 * len(text))
    assert text_of(dp, dp.dataset) == text[:place] and text_of(dp, dp.val_dataset) == text[place:]
    assert dp.val_texts == [text[place:]] and dp.val_bytes == len(text) - place and dp.val_tokens == dp.val_bytes + 1
    assert dp.train_tokens == place + 1


def test_equal_documents_stand_on_one_side():
    draw = random.Random(1)
    for seed in range(50):
        documents = [f"document {draw.randrange(30)} " * draw.randrange(1, 4) for _ in range(60)]
        train, val = split_documents(documents, 0.2, seed)
        assert not set(train) & set(val) and train and val
        assert Counter(train) + Counter(val) == Counter(documents), "nothing is lost"
        share = sum(map(len, val)) / sum(map(len, documents))
        assert 0.1 < share <= 0.2
        assert [text for text in documents if text in set(train)] == train, "documents keep their order"
        shuffled = draw.sample(documents, len(documents))
        assert set(split_documents(shuffled, 0.2, seed)[1]) == set(val), "content decides, not the place"
    assert len({tuple(split_documents(documents, 0.2, seed)[1]) for seed in range(10)}) > 5, "the seed decides"


def test_small_corpora_have_two_parts_too():
    assert split_documents(TWO, 0.1, 0) == (["goodnight moon"], ["hello world"]), "none fits: the shortest"
    assert split_documents(["abcdefghij"] * 3, 0.3, 0) == (["abcdefg"] * 3, ["hij"] * 3)
    assert split_documents(TWO, 0.0, 0) == (TWO, [])
    for text in ("a", "ab"):
        with pytest.raises(ValueError, match="too few for two parts"):
            split_documents([text], 0.1 if text == "a" else 0.9, 0)


def test_the_tokenizer_learns_from_the_training_part_alone():
    train, val = "a\u00e9" * 100, "\u4e2d"
    dp = psannLMDataPrep([train, val], tokenizer="simple", val_split=0.1)
    assert dp.val_texts == [val] and dp.tokenizer.characters == "\u00e9"
    assert dp.val_tokens == 4 and text_of(dp, dp.val_dataset) == val


def test_validation_windows_are_not_longer_than_training_windows():
    dp = psannLMDataPrep(["abc", "defg" * 10], tokenizer="simple", val_split=0.95, max_length=64, seed=3)
    assert dp.val_texts == ["defg" * 10]
    assert dp.dataset.window == 4 == dp.val_dataset.window


def test_the_same_call_gives_the_same_data():
    first, second = (psannLMDataPrep(default_corpus()[:20], tokenizer_vocab_size=600, val_split=0.2, seed=3) for _ in range(2))
    assert first.tokenizer.to_files() == second.tokenizer.to_files() and first.val_texts == second.val_texts
    assert (first.dataset.stream == second.dataset.stream).all()
    assert psannLMDataPrep(default_corpus()[:20], tokenizer="simple", val_split=0.2, seed=4).val_texts != first.val_texts


# ---- files and prebuilt tokenizers


def test_files_and_folders_are_read_byte_for_byte(tmp_path):
    (tmp_path / "sub").mkdir()
    contents = {"b.txt": "line\r\none\rtwo\n", "a.txt": "\ufeffbom", "sub/c.txt": "na\u00efve \U0001f600"}
    for name, text in contents.items():
        (tmp_path / name).write_bytes(text.encode("utf-8"))
    (tmp_path / "ignored.md").write_text("no")
    dp = psannLMDataPrep(paths=tmp_path, tokenizer="simple")
    assert text_of(dp, dp.dataset) == "|".join(contents[name] for name in ("a.txt", "b.txt", "sub/c.txt"))
    dp = psannLMDataPrep(paths=[tmp_path / "ignored.md", str(tmp_path / "sub")], tokenizer="simple")
    assert text_of(dp, dp.dataset) == "no|" + contents["sub/c.txt"]


def test_a_text_is_never_taken_for_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("the content of the file")
    for text in ("corpus.txt", str(tmp_path / "corpus.txt")):
        dp = psannLMDataPrep([text], tokenizer="simple")
        assert text_of(dp, dp.dataset) == text


def test_texts_may_come_from_a_generator_and_empty_ones_are_left_out(caplog):
    dp = psannLMDataPrep((text for text in ("one", "", "two")), tokenizer="simple")
    assert text_of(dp, dp.dataset) == "one|two" and "1 of 3 texts are empty" in caplog.text


def test_a_tokenizer_may_be_given(tmp_path):
    tokenizer = train_tokenizer("tokenizers", default_corpus()[:10], 400)
    dp = psannLMDataPrep(TWO, tokenizer=tokenizer)
    assert dp.tokenizer is tokenizer and dp.vocab_size == 400 and dp.tokenizer_backend == "tokenizers" == dp.config.tokenizer
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = psannLMDataPrep(TWO, tokenizer_model_path=path)
        assert (loaded.dataset.stream == dp.dataset.stream).all() and loaded.eos_id == dp.eos_id
    with pytest.raises(ValueError, match="tokenizer is 'simple', but tokenizer_model_path .* holds a 'tokenizers' tokenizer"):
        psannLMDataPrep(TWO, tokenizer="simple", tokenizer_model_path=tmp_path)
    with pytest.raises(ValueError, match="leave out tokenizer_model_path"):
        psannLMDataPrep(TWO, tokenizer=tokenizer, tokenizer_model_path=tmp_path)


# ---- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(texts="one text"), ValueError, "texts is one string; pass a list"),
        (dict(texts=b"bytes"), ValueError, "texts is one string; pass a list"),
        (dict(texts=5), ValueError, "texts is a int; pass a list"),
        (dict(texts=["a", 5]), ValueError, "texts[1] is a int; every text must be a str"),
        (dict(texts=["a", b"b"]), ValueError, "texts[1] is a bytes; every text must be a str; decode it"),
        (dict(texts=["a", "b\ud800"]), ValueError, "texts[1] holds a lone surrogate, '\\ud800', at character 1"),
        (dict(texts=[]), ValueError, "texts is empty; pass at least one text"),
        (dict(texts=["", ""]), ValueError, "all 2 texts are empty strings"),
        (dict(), ValueError, "pass texts=[...] or paths=[...], one of them"),
        (dict(texts=["a"], paths=["b"]), ValueError, "pass texts=[...] or paths=[...], one of them"),
        (dict(paths=[]), ValueError, "paths is empty"),
        (dict(texts=TWO, max_length=0), ValueError, "max_length is 0; it must be a whole number of at least 1"),
        (dict(texts=TWO, val_split=1.0), ValueError, "val_split is 1.0; it must be a number in [0, 1)"),
        (dict(texts=TWO, val_split=-0.1), ValueError, "val_split is -0.1; it must be a number in [0, 1)"),
        (dict(texts=TWO, tokenizer="bpe"), ValueError, "tokenizer is 'bpe'; it must be one of 'auto'"),
        (dict(texts=TWO, tokenizer="sentencepiece", tokenizer_vocab_size=100), ValueError, "vocab_size is 100;"),
        (dict(texts=TWO, tokenizer_model_path="gone.model"), FileNotFoundError, "no tokenizer at gone.model"),
        (dict(texts=TWO, max_len=5), TypeError, "no option 'max_len'; did you mean 'max_length'?"),
        (dict(texts=TWO, vocab_size=5), TypeError, "no option 'vocab_size'; did you mean 'tokenizer_vocab_size'?"),
        (dict(path="x"), TypeError, "no option 'path'; did you mean 'paths'?"),
        (dict(text=TWO), TypeError, "no option 'text'; did you mean 'texts'?"),
    ],
)
def test_bad_calls_are_refused(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        psannLMDataPrep(**call)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes("na\u00efve ".encode() + b"\xff end")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path, error, message in (
        ("bad.txt", ValueError, "bad.txt is not UTF-8: byte 0xff at offset 7"),
        ("empty.txt", ValueError, "empty.txt is empty"),
        ("folder", ValueError, "folder holds no .txt file"),
        ("gone.txt", FileNotFoundError, "gone.txt does not exist"),
        (".", ValueError, "bad.txt is not UTF-8"),
    ):
        with pytest.raises(error, match=message):
            psannLMDataPrep(paths=[tmp_path / "good.txt", tmp_path / path])
