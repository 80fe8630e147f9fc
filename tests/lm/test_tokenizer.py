"""Tokenizers: nothing is lost, nothing in a text is special, the same text makes the same tokenizer."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
import tokenizers
from psann_fast.data import Tokenizer, default_corpus, load_tokenizer, tokenizer_from_files, train_tokenizer
from psann_fast.data import tokenizer as interface
from psann_fast.data import words
from psann_fast.data.bpe_tokenizer import BPETokenizer
from psann_fast.data.cutting import cut
from psann_fast.data.sampling import sample
from psann_fast.data.sentencepiece_tokenizer import SentencePieceTokenizer
from texts import AWKWARD, SPECIAL_NAMES, adversarial_text, random_text

NAMES = ("simple", "sentencepiece", "tokenizers")


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {name: train_tokenizer(name, default_corpus(), None if name == "simple" else 2048) for name in NAMES}


@pytest.fixture(params=NAMES)
def tokenizer(request, trained) -> Tokenizer:
    return trained[request.param]


# ---- nothing is lost


def check_round_trips(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert not np.isin(ids, (tokenizer.pad_id, tokenizer.eos_id)).any(), f"{text!r} gives a special id"
        assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        back = tokenizer.decode(ids)
        assert back == text, f"{text!r} comes back as {back!r}"


def test_ten_thousand_random_texts_come_back(tokenizer):
    draw = random.Random(20240)
    check_round_trips(tokenizer, [random_text(draw) for _ in range(10_000)])


def test_every_character_comes_back(tokenizer):
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000), *range(0x1F000, 0x1FB00), *range(0x10FF00, 0x110000)]))
    check_round_trips(tokenizer, [everything, *AWKWARD, *SPECIAL_NAMES, "", "a" * 10_000, " " * 10_000, "\n" * 10_000])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "corpus",
    [
        *(["hello world", "goodnight moon"], ["a"], ["\n\n"], ["\0"], ["\u2581"], ["  "], ["\t\t \t"]),
        *(["\u4e2d\u6587" * 50], list(AWKWARD)),
    ],
    ids=["two sentences", "one letter", "line breaks", "nul", "U+2581", "spaces", "tabs", "chinese", "awkward"],
)
def test_small_corpora_train_and_lose_nothing(name, corpus):
    tokenizer = train_tokenizer(name, corpus, 2000)
    draw = random.Random(5)
    check_round_trips(tokenizer, [*corpus, *(random_text(draw) for _ in range(200))])


@pytest.mark.campaign(weight=2)
@pytest.mark.parametrize("name", NAMES)
def test_random_texts_come_back(campaign, trained, name):
    """A case is 1,000 texts."""
    for seed in campaign:
        draw = random.Random(seed)
        check_round_trips(trained[name], [random_text(draw) for _ in range(1000)])


@pytest.mark.campaign(weight=0.5)
@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_of_random_corpora_lose_nothing(campaign, name):
    for seed in campaign:
        draw = random.Random(seed)
        corpus = [random_text(draw, 200) for _ in range(draw.randrange(1, 20))]
        tokenizer = train_tokenizer(name, [*corpus, "a"], draw.choice((261, 300, 500, 3000)))
        check_round_trips(tokenizer, [*corpus, *(random_text(draw) for _ in range(100))])


# ---- nothing in a text is special


def test_names_of_special_tokens_stay_text(tokenizer):
    draw = random.Random(7)
    check_round_trips(tokenizer, [adversarial_text(draw) for _ in range(2000)])


@pytest.mark.parametrize("name", NAMES)
def test_names_of_special_tokens_stay_text_when_the_corpus_is_full_of_them(name):
    tokenizer = train_tokenizer(name, [" ".join(SPECIAL_NAMES)] * 50, 1500)
    draw = random.Random(8)
    check_round_trips(tokenizer, [adversarial_text(draw) for _ in range(500)])


@pytest.mark.campaign(weight=0.5)
@pytest.mark.parametrize("name", NAMES)
def test_adversarial_texts_give_no_special_id(campaign, trained, name):
    """A case is 1,000 texts."""
    for seed in campaign:
        draw = random.Random(seed)
        check_round_trips(trained[name], [adversarial_text(draw) for _ in range(1000)])


def test_special_ids_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("one two")
    mixed = [tokenizer.eos_id, *ids[:1], tokenizer.pad_id, *ids[1:], tokenizer.eos_id]
    assert tokenizer.decode(mixed) == "one two"
    assert tokenizer.pad_id != tokenizer.eos_id


# ---- the interface


def test_decoded_bytes_add_up_and_broken_ones_become_replacements(tokenizer):
    draw = random.Random(9)
    for _ in range(200):
        text = random_text(draw)
        ids = tokenizer.encode(text)
        place = draw.randrange(len(ids) + 1)
        assert tokenizer.decode_bytes(ids[:place]) + tokenizer.decode_bytes(ids[place:]) == text.encode("utf-8")
    bytes_of_euro = tokenizer.encode("\U000f1234")
    assert len(bytes_of_euro) == 4, "a character never seen is four bytes"
    assert tokenizer.decode(bytes_of_euro[:3]) == "\ufffd"
    assert tokenizer.decode(np.array([], np.int64)) == "" and tokenizer.decode([]) == ""


def test_a_batch_equals_its_texts(tokenizer):
    draw = random.Random(10)
    texts = [random_text(draw, 60) for _ in range(200)] + default_corpus()[:5]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert ids.dtype == np.int32 and ids.tolist() == tokenizer.encode(text)
    assert tokenizer.encode_batch([]) == []


def test_pieces_join_to_the_text_and_are_cut_at_words():
    draw = random.Random(11)
    for _ in range(300):
        text, size = random_text(draw, 100), draw.randrange(1, 60)
        pieces, rest = cut(text, size)
        assert "".join(pieces) + rest == text
        assert all(1 <= len(piece) <= size for piece in pieces) and len(rest) <= size
    pieces, rest = cut("one two  three" + "x" * 30, 12)
    assert pieces[:2] == ["one two", "  three" + "x" * 5]


def test_cutting_changes_no_token(trained):
    """The libraries' own encoding of an uncut text is the witness."""
    text = "".join(default_corpus())[:200_000] + "  \n \t\x1c! x  y\u00a0 z " * 500
    subword = trained["sentencepiece"]
    assert subword.can_cut and subword.encode(text) == subword.processor.encode(text)
    byte_level = trained["tokenizers"]
    assert byte_level.can_cut and byte_level.encode(text) == byte_level.library.encode(text).ids


def test_remembered_words_change_no_token(tokenizer, monkeypatch):
    """With a table of words so small that it is always replaced, and with words as the libraries see them one by one."""
    draw = random.Random(16)
    texts = [random_text(draw, 80) for _ in range(300)] + ["\x1c!\x1c! \x1f\n  x \u00a0\u00a0 y \u2028 z\x85"]
    wanted = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    monkeypatch.setattr(words, "MOST_REMEMBERED", 100)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == wanted
    assert [tokenizer.encode(text) for text in texts] == wanted
    if tokenizer.name == "tokenizers":
        assert [tokenizer.library.encode(text).ids for text in texts] == wanted
    if tokenizer.name == "sentencepiece":
        plain = [(text, ids) for text, ids in zip(texts, wanted) if "\u2581" not in text]
        assert len(plain) > 50 and all(tokenizer.processor.encode(text) == ids for text, ids in plain)


def test_threads_may_share_a_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(words, "MOST_REMEMBERED", 2000)
    draw = random.Random(17)
    texts = [random_text(draw, 80) for _ in range(400)]
    wanted = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == wanted


def test_a_stream_equals_the_whole_text(tokenizer, monkeypatch):
    monkeypatch.setattr(interface, "GROUP_CHARACTERS", 5000)
    monkeypatch.setattr(type(tokenizer), "piece_characters", 1000)
    draw = random.Random(12)
    text = "".join(default_corpus()[:4]) + "x" * 9000 + "\u4e2d" * 3000 + random_text(draw, 500) + " " * 4000 + "end"
    whole = tokenizer.encode(text)
    for longest in (1, 7, 3000, len(text)):
        chunks, start = [], 0
        while start < len(text):
            stop = start + draw.randint(1, longest)
            chunks.append(text[start:stop])
            start = stop
        assert np.concatenate(list(tokenizer.encode_stream(chunks))).tolist() == whole
    assert list(tokenizer.encode_stream([])) == [] == list(tokenizer.encode_stream([""]))


def test_the_simple_tokenizer_is_characters():
    tokenizer = train_tokenizer("simple", ["ab\u00e9", "\u4e2d\u00e9"])
    assert tokenizer.vocab_size == 258 + 2
    assert len(tokenizer.encode("ab\u00e9\u4e2d")) == 4, "one id for each character of the corpus"
    assert len(tokenizer.encode("xyz")) == 3 and len(tokenizer.encode("\u6587")) == 3
    assert train_tokenizer("simple", ["\u00e9", "\u4e2d\u4e2d"], 259).characters == "\u4e2d", "the most frequent character stays"


# ---- errors


@pytest.mark.parametrize("call", ["encode", "encode_batch", "encode_stream"])
def test_a_lone_surrogate_is_refused_with_its_position(tokenizer, call):
    argument = {"encode": "abc\ud800d", "encode_batch": ["abc", "abc\ud800d"], "encode_stream": ["ab", "c\ud800d"]}[call]
    with pytest.raises(ValueError, match=r"lone surrogate, '\\ud800', at character 3"):
        list(getattr(tokenizer, call)(argument))


@pytest.mark.parametrize("name", NAMES)
def test_training_refuses_a_lone_surrogate(name):
    with pytest.raises(ValueError, match=r"text 1 of .* at character 2"):
        train_tokenizer(name, ["fine", "ab\udfff"], 300)


def test_what_cannot_be_decoded_is_named(tokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {bad} is outside"):
            tokenizer.decode([5, bad])
    for bad in ([[1, 2]], [0.5], ["a"]):
        with pytest.raises(ValueError, match="whole numbers"):
            tokenizer.decode(bad)
    with pytest.raises(TypeError, match="is a bytes; pass a str"):
        tokenizer.encode(b"bytes")


def test_names_and_sizes_that_cannot_be_served(monkeypatch):
    with pytest.raises(ValueError, match="tokenizer is 'bpe'; choose one of"):
        train_tokenizer("bpe", ["a"])
    for name, least in (("simple", 258), ("sentencepiece", 261), ("tokenizers", 258)):
        train_tokenizer(name, ["some text"], least)
        with pytest.raises(ValueError, match=f"needs at least {least}"):
            train_tokenizer(name, ["some text"], least - 1)
    for missing, chosen in (((), "sentencepiece"), (("sentencepiece",), "tokenizers"), (("sentencepiece", "tokenizers"), "simple")):
        with monkeypatch.context() as m:
            for library in missing:
                m.setitem(sys.modules, library, None)
            assert interface.resolve("auto") == chosen
            for library in missing:
                with pytest.raises(ModuleNotFoundError, match=f"pip install {library}"):
                    train_tokenizer(library, ["a"])


def test_a_vocabulary_that_shrinks_says_so(caplog):
    with caplog.at_level(logging.INFO, "psann_fast"):
        tokenizer = train_tokenizer("sentencepiece", ["hello world", "goodnight moon"], 4096)
    assert tokenizer.vocab_size < 400
    assert f"vocabulary of {tokenizer.vocab_size} ids; 4096 were asked for" in caplog.text


# ---- the same texts make the same tokenizer


def test_training_is_the_same_in_another_process(trained):
    code = (
        "import hashlib\nfrom psann_fast.data import default_corpus, train_tokenizer\n"
        f"for name in {NAMES}:\n"
        "    files = train_tokenizer(name, default_corpus(), None if name == 'simple' else 2048).to_files()\n"
        "    print(hashlib.sha256(b''.join(files[key] for key in sorted(files))).hexdigest())\n"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    here = [trained[name].to_files() for name in NAMES]
    assert there == [hashlib.sha256(b"".join(files[key] for key in sorted(files))).hexdigest() for files in here]


def test_a_large_corpus_is_sampled():
    texts = [f"{number} " * 3000 for number in range(50)]
    everything = sample(texts, 0, 1 << 30)
    assert "".join(everything) == "".join(texts)
    some = sample(iter(texts), 0, 100_000)
    assert some == sample(texts, 0, 100_000) != sample(texts, 1, 100_000)
    assert 95_000 < sum(len(piece.encode()) for piece in some) <= 100_000
    places = [everything.index(piece) for piece in some]
    assert places == sorted(places), "pieces keep their order"
    assert len({piece.split()[0] for piece in some}) > 15, "pieces come from all over the corpus"


# ---- saving and loading


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    names = tokenizer.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert sorted(names) == sorted(file.name for file in (tmp_path / "a").iterdir())
    assert loaded.to_files() == tokenizer.to_files() == tokenizer_from_files(tokenizer.to_files()).to_files()
    assert type(loaded) is type(tokenizer) and loaded.token_bytes == tokenizer.token_bytes
    assert (loaded.name, loaded.pad_id, loaded.eos_id) == (tokenizer.name, tokenizer.pad_id, tokenizer.eos_id)
    assert loaded.can_cut == tokenizer.can_cut
    draw = random.Random(13)
    texts = [random_text(draw) for _ in range(300)] + default_corpus()[:3]
    assert [ids.tolist() for ids in loaded.encode_batch(texts)] == [ids.tolist() for ids in tokenizer.encode_batch(texts)]


def test_damaged_files_are_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    description = tmp_path / "psann_tokenizer.json"
    good = json.loads(description.read_text())
    for change, message in (
        ({"format": "other"}, "does not describe a psann-fast tokenizer"),
        ({"version": 2}, "of version 1"),
        ({"name": "bpe"}, "name is 'bpe'"),
        ({"vocab_size": 7}, "do not belong together"),
        ({"pad_id": good["pad_id"] + 10**9}, "pad_id is"),
        ({"eos_id": "2"}, "eos_id is"),
        ({"file": "../tokenizer.model"}, "must be the name of a file beside it"),
        ({"file": "gone.model"}, "gone.model is missing"),
    ):
        description.write_text(json.dumps({**good, **change}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Tokenizer.load(tmp_path)
    for content in (b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"3"):
        description.write_bytes(content)
        with pytest.raises(ValueError, match="psann_tokenizer.json"):
            Tokenizer.load(tmp_path)
    description.write_text(json.dumps(good))
    if "file" in good:
        content = (tmp_path / good["file"]).read_bytes()
        for damaged in (b"", b"garbage", b"{}", b'{"model": {}}', content[: len(content) // 2]):
            (tmp_path / good["file"]).write_bytes(damaged)
            with pytest.raises(ValueError, match=good["file"]):
                Tokenizer.load(tmp_path)
    else:
        for characters in (None, "a", "\u00e9\u00e9", "\u00ea\u00e9", "\ud800"):
            description.write_text(json.dumps({**good, "characters": characters}))
            with pytest.raises(ValueError, match="characters"):
                Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no psann_tokenizer.json among"):
        tokenizer_from_files({"tokenizer.json": b"{}"})
    description.unlink()
    with pytest.raises(FileNotFoundError, match="psann_tokenizer.json is missing"):
        Tokenizer.load(tmp_path)


# ---- prebuilt tokenizers


def write_sentencepiece(path, **options) -> None:
    model = io.BytesIO()
    settings = dict(vocab_size=600, hard_vocab_limit=False, minloglevel=2, num_threads=1, **options)
    lines = [line for text in default_corpus()[:20] for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    path.write_bytes(model.getvalue())


def test_the_losses_of_a_prebuilt_sentencepiece_model_are_named(tmp_path):
    path = tmp_path / "plain.model"
    write_sentencepiece(path, control_symbols=["[EOS]", "<mask>"], user_defined_symbols=["<|im_start|>"])
    with pytest.warns(UserWarning, match=r"collapses runs of spaces \('two  spaces' becomes 'two spaces'\)") as caught:
        tokenizer = load_tokenizer(path)
    assert "changes line breaks" in str(caught[0].message) and "normalizes compatibility characters" in str(caught[0].message)
    assert tokenizer.eos_id == tokenizer.processor.eos_id() == 2
    assert tokenizer.pad_id == tokenizer.processor.get_piece_size() == tokenizer.vocab_size - 1, "appended"
    text = "The statement <s> ends here </s> [EOS] not <mask> there <|im_start|>."
    ids = tokenizer.encode(text)
    assert ids == tokenizer.processor.encode(text), "the ids are the library's own"
    assert not any(tokenizer.processor.is_control(i) for i in ids)
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.pad_id]) == text, "no space at the start"
    assert tokenizer.decode_bytes(ids).decode() == " " + text
    assert tokenizer.encode_batch([text, "x" * 9000])[1].tolist() == tokenizer.processor.encode("x" * 9000), "uncut"
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(text) == ids


def test_our_own_model_file_is_lossless_as_a_prebuilt_one(trained, tmp_path, recwarn):
    trained["sentencepiece"].save(tmp_path)
    trained["tokenizers"].save(tmp_path)
    for file in ("tokenizer.model", "tokenizer.json"):
        loaded = load_tokenizer(tmp_path / file)
        draw = random.Random(14)
        check_round_trips(loaded, [random_text(draw) for _ in range(500)])
        assert (loaded.vocab_size, loaded.pad_id, loaded.eos_id) == (
            trained[loaded.name].vocab_size, trained[loaded.name].pad_id, trained[loaded.name].eos_id
        )  # fmt: skip
    assert not recwarn.list


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char", "word"])
def test_no_kind_of_sentencepiece_model_gives_control_ids(model_type, tmp_path):
    path = tmp_path / "controls.model"
    controls = ["[EOS]", "the", "x"]
    write_sentencepiece(path, model_type=model_type, add_dummy_prefix=False, control_symbols=controls)
    tokenizer = load_tokenizer_quietly(path)
    ids = np.concatenate(tokenizer.encode_batch(["</s>", "a </s> b", "<s></s>", "[EOS]", "the x", "x"]))
    assert not any(tokenizer.processor.is_control(i) for i in ids.tolist())
    assert tokenizer.decode([tokenizer.processor.piece_to_id("the")]) == ""


def load_tokenizer_quietly(path) -> Tokenizer:
    with pytest.warns(UserWarning, match="does not give every text back"):
        return load_tokenizer(path)


def foreign(kind: str) -> tokenizers.Tokenizer:
    """Tokenizers whose own `encode` turns "[EOS]" or "</s>" in a text into a special id, or cuts, or fills."""
    text = default_corpus()[:20]
    specials = ["[PAD]", "[EOS]", "</s>", "[UNK]"]
    models, pre, decoders, trainers = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.decoders, tokenizers.trainers
    if kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = tokenizers.normalizers.BertNormalizer()
        made.pre_tokenizer, made.decoder = pre.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    elif kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=specials, unk_token="[UNK]", show_progress=False)
    elif kind == "words":
        made = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
        made.pre_tokenizer = pre.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    else:
        made = tokenizers.Tokenizer(models.BPE(dropout=0.5))
        made.pre_tokenizer, made.decoder = pre.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(text, trainer)
    made.enable_truncation(5)
    made.enable_padding(length=32, pad_id=0, pad_token="[PAD]")
    return made


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "words", "bytes"])
def test_special_tokens_of_a_prebuilt_tokenizer_stay_text(kind, tmp_path, recwarn):
    path = tmp_path / "foreign.json"
    foreign(kind).save(str(path))
    tokenizer = load_tokenizer(path)
    lossy = [str(w.message) for w in recwarn if "does not give every text back" in str(w.message)]
    assert bool(lossy) == (kind != "bytes"), "only the byte-level one loses nothing"
    assert tokenizer.library.token_to_id("[PAD]") == tokenizer.pad_id, "its own padding is used"
    assert tokenizer.library.token_to_id("</s>") == tokenizer.eos_id
    specials = [tokenizer.library.token_to_id(token) for token in ("[PAD]", "[EOS]", "</s>")]
    draw = random.Random(15)
    texts = ["[EOS]", "</s>", "a [EOS] b</s> [PAD]"] + [adversarial_text(draw) for _ in range(300)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert not np.isin(ids, specials).any(), text
        assert kind != "bytes" or tokenizer.decode(ids) == text
    plain = "The statement is an expression, and so on and so on and so on."
    ids = tokenizer.encode(plain)
    assert len(ids) > 5 and ids == tokenizer.encode(plain), "neither cut off nor filled nor random"
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.pad_id]) == tokenizer.decode(ids)
    saved = Tokenizer.load(tmp_path / "saved") if tokenizer.save(tmp_path / "saved") else None
    assert saved.encode(plain) == ids and (saved.pad_id, saved.eos_id) == (tokenizer.pad_id, tokenizer.eos_id)
    assert saved.token_bytes == tokenizer.token_bytes


def test_a_special_token_of_one_character_is_refused(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1, "|": 2, "a": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["|"])
    made.save(str(tmp_path / "t.json"))
    with pytest.warns(UserWarning):
        tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.vocab_size == 6 and {tokenizer.pad_id, tokenizer.eos_id} == {4, 5}, "what is no special token is a word"
    with pytest.raises(ValueError, match=r"turns '\|' into the special id 2"):
        tokenizer.encode("a | a")


def test_prebuilt_files_that_are_none(tmp_path):
    for name, content, message in (
        ("a.model", b"garbage", "a.model is not a SentencePiece model"),
        ("b.model", b"", "b.model is empty"),
        ("c.json", b"garbage", "c.json is not JSON"),
        ("d.json", b"[]", "d.json is JSON, but not a tokenizer"),
        ("e.json", b'{"model": {"type": "BPE"}}', "e.json is not a tokenizer"),
        ("f.txt", b"text", "'.model' or a Hugging Face '.json'"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "gone.model")
    with pytest.raises(FileNotFoundError, match="psann_tokenizer.json is missing"):
        load_tokenizer(tmp_path)


def test_direct_construction_checks_ids(trained):
    content = trained["tokenizers"].to_files()["tokenizer.json"]
    with pytest.raises(ValueError, match="pad_id is 99999"):
        BPETokenizer(content, 99999, 1)
    with pytest.raises(ValueError, match="empty"):
        SentencePieceTokenizer(b"")


# ---- memory

STREAM = """
import random, resource, sys
import psann_fast.data
from psann_fast.data import default_corpus, train_tokenizer
megabytes = int(sys.argv[1])
words = [word for text in default_corpus() for word in text.replace("\\n", " ").split(" ")]

def line():
    draw, sent = random.Random(0), 0
    while sent < megabytes << 20:
        chunk = " ".join(draw.choices(words, k=8000)) + " "
        sent += len(chunk)
        yield chunk

train_tokenizer("auto", ["warm"], 300)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokenizer = train_tokenizer("auto", line(), 4096)
tokens = sum(len(ids) for ids in tokenizer.encode_stream(line()))
print(tokens, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def stream_a_line(megabytes: int) -> None:
    pytest.importorskip("resource")
    run = subprocess.run([sys.executable, "-c", STREAM, str(megabytes)], capture_output=True, text=True, check=True)
    tokens, grown = map(float, run.stdout.split())
    assert tokens > megabytes * 200_000
    assert grown < 300, f"{megabytes} MB streamed with {grown:.0f} MB"


@pytest.mark.campaign(weight=1)
def test_a_long_line_is_streamed_in_little_memory(campaign):
    """Memory does not depend on the length; 1024 is the figure to reach."""
    for _ in campaign:
        stream_a_line(128)
