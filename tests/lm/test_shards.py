"""Token shards: the ids of the texts, whoever encodes them; the same examples, whoever reads them;
damage and bad files are named."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import xxhash
from psann_fast import psannLM, psannLMDataPrep
from psann_fast.cli import main
from psann_fast.data import pack, tokenizing, train_tokenizer
from psann_fast.data.corpora import documents
from psann_fast.data.packing import IGNORED, Examples
from psann_fast.data.shards import Permutation, ShardedExamples, Shards
from psann_fast.data.tokenizing import tokenize
from psann_fast.sealed import sealed
from tiny import SENTENCES, fitted, model

TEXTS = [sentence * (3 + 40 * (i % 3)) for i, sentence in enumerate(SENTENCES * 6)] + ["caf\u00e9 \U0001f600", "x", "\u0416" * 9000]


def stream_of(shards: Shards, part: str = "train") -> list[np.ndarray]:
    """The documents in the shards."""
    found = []
    for entry in shards.parts[part]["shards"]:
        ids = np.fromfile(shards.folder / entry["file"], shards.dtype)
        assert ids[0] == ids[-1] == shards.tokenizer.eos_id
        found += np.split(ids[1:], np.flatnonzero(ids[1:] == shards.tokenizer.eos_id) + 1)[:-1]
    return [ids[:-1] for ids in found]


def write_jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.mark.parametrize("name", ["simple", "sentencepiece", "tokenizers"])
def test_the_shards_hold_what_encode_gives(tmp_path, name, monkeypatch):
    monkeypatch.setattr(tokenizing, "TASK_CHARACTERS", 5000)  # documents share tasks, and tasks share documents
    monkeypatch.setattr("psann_fast.data.corpora.CHUNK_BYTES", 777)
    known = train_tokenizer(name, TEXTS, None if name == "simple" else 320)
    parts = tokenize(
        [write_jsonl(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer=known, workers=1, shard_tokens=4000, progress=False
    )
    shards = Shards(tmp_path / "out")
    assert parts["train"]["documents"] == len(TEXTS) and parts["train"]["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert len(parts["train"]["shards"]) > 2 and shards.dtype == np.uint16
    for ids, text in zip(stream_of(shards), TEXTS, strict=True):
        assert ids.tolist() == known.encode(text)
    assert parts["train"]["tokens"] == sum(len(known.encode(text)) + 1 for text in TEXTS)
    assert shards.tokenizer.to_files() == known.to_files()


def test_several_workers_write_the_same_files(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl")
    known = train_tokenizer("simple", TEXTS)
    monkeypatch.setattr(tokenizing, "TASK_CHARACTERS", 3000)
    for workers in (1, 2):
        tokenize(
            [source], tmp_path / str(workers), tokenizer=known, workers=workers, shard_tokens=9000, val_split=0.3, progress=False
        )
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "12")
    assert one == two and {"train-00001.bin", "validation-00000.bin", "index.json", "psann_tokenizer.json"} <= set(one)


def test_every_kind_of_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["from parquet", "row two"]}), tmp_path / "c.parquet")
    write_jsonl(tmp_path / "b.jsonl", ["from json", "line two"])
    (tmp_path / "a.txt").write_text("from text\nits second line\n\n")
    read = lambda *names, **options: ["".join(d) for d in documents([tmp_path / n for n in names], **options)]  # noqa: E731
    assert read("a.txt", "b.jsonl") == ["from text\nits second line\n\n", "from json", "line two"]
    assert read("a.txt", by_line=True) == ["from text", "its second line", ""]
    assert read("c.parquet", field="body") == ["from parquet", "row two"]


def test_lines_are_read_chunk_by_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("psann_fast.data.corpora.CHUNK_BYTES", 7)
    long = "long enough for chunks\nshort\n" * 3
    for text in ("", "a", "a\n", "\n", "\n\nb", "a\n\n", long, "1234567\n1234567\n", "\u00e9\n" * 9, "x" * 50):
        (tmp_path / "a.txt").write_text(text)
        found = [list(document) for document in documents([tmp_path / "a.txt"], by_line=True)]
        assert ["".join(document) for document in found] == text.removesuffix("\n").split("\n") if text else found == []
        assert all(len(chunk) <= 7 for document in found for chunk in document)


def test_a_split_keeps_equal_documents_together(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 3)
    known = train_tokenizer("simple", TEXTS)
    parts = tokenize([source], tmp_path / "out", tokenizer=known, workers=1, val_split=0.4, progress=False)
    shards = Shards(tmp_path / "out")
    sides = [{bytes(ids) for ids in stream_of(shards, part)} for part in ("train", "validation")]
    assert all(sides) and not sides[0] & sides[1]
    assert parts["train"]["documents"] + parts["validation"]["documents"] == 3 * len(TEXTS)


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("a.txt", b"good \xff bad", {}, r"a.txt is not UTF-8: byte 0xff at offset 5"),
        ("a.txt", b"x" * 3000 + b"\xe2\x82", {}, "a.txt is not UTF-8: byte 0xe2 at offset 3000"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, "a.jsonl, line 2, is not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', {}, r"a.jsonl, line 1, has no text in 'text' \(it has body\); name the field with --field"),
        ("a.jsonl", b'{"text": 5}\n', {}, "line 1, has no text in 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', {}, "lone surrogate"),
        ("a.jsonl", b"[" * 100_000, {}, "line 1, is not JSON"),
        ("a.parquet", b"PAR1 but not really", {}, "a.parquet is not a Parquet file"),
        ("a.txt", b"", {}, "no text is left for training"),
        ("a.jsonl", b'{"text": ""}\n', {}, "no text is left for training"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenize([tmp_path / name], tmp_path / "out", tokenizer="simple", workers=1, progress=False, **options)
    assert not (tmp_path / "out" / "index.json").exists()


def test_paths_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt does not exist"):
        tokenize([tmp_path / "none.txt"], tmp_path / "out")
    with pytest.raises(ValueError, match="holds no .txt, .jsonl, .parquet file"):
        tokenize([tmp_path], tmp_path / "out")


# -- reading --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tokenize(
        [write_jsonl(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer="simple", workers=1, shard_tokens=3000, val_split=0.2,
        progress=False
    )  # fmt: skip
    return tmp_path / "out"


def test_damage_is_found(folder):
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        whole = (folder / name).read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for content in (b"", whole[:-1], whole + b"\0", flipped):
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match="run psann-fast tokenize again"):
                Shards(folder)
        (folder / name).write_bytes(whole)
    (folder / "train-00000.bin").unlink()
    with pytest.raises(ValueError, match="train-00000.bin has 0 bytes and should have"):
        Shards(folder)
    with pytest.raises(ValueError, match="does not hold usable token shards"):
        Shards(folder.parent)


def change_index(folder, change) -> None:
    index = json.loads((folder / "index.json").read_text())
    del index["xxh3_128"]  # whoever means harm can compute it anew
    change(index)
    (folder / "index.json").write_bytes(sealed(index))


@pytest.mark.parametrize("name", ["../a.jsonl", "/etc/hostname", "..", ""])
def test_an_index_reaches_nothing_outside_its_folder(folder, name):
    change_index(folder, lambda index: index["parts"]["train"]["shards"][0].update(file=name))
    with pytest.raises(ValueError, match="is not the name of a file beside index.json"):
        Shards(folder)


def test_an_id_beyond_the_vocabulary_is_found(folder):
    path = folder / "train-00000.bin"
    ids = np.fromfile(path, np.uint16)
    ids[5] = 60_000
    ids.tofile(path)
    digest = xxhash.xxh3_128_hexdigest(ids.tobytes())
    change_index(folder, lambda index: index["parts"]["train"]["shards"][0].update(xxh3_128=digest))
    with pytest.raises(ValueError, match=r"train-00000.bin has the id 60000, and the tokenizer's are 0 to \d+\)"):
        Shards(folder)


def test_the_examples_are_those_of_each_shard(folder):
    shards = Shards(folder)
    examples = shards.examples("train", 50, seed=3)
    eos, pad = shards.tokenizer.eos_id, shards.tokenizer.pad_id
    alone = [
        Examples(np.fromfile(folder / entry["file"], np.uint16), 50, eos_id=eos, pad_id=pad, shrink=False)
        for entry in shards.parts["train"]["shards"]
    ]
    assert len(alone) > 2 and len(examples) == sum(map(len, alone))
    for offset in (0, 17):
        for name in ("input_ids", "targets", "document_starts"):
            wanted = torch.cat([one.batch(np.arange(len(one)), offset)[name] for one in alone])
            order = np.random.default_rng(0).permutation(len(examples))
            assert torch.equal(examples.batch(order, offset)[name], wanted[torch.from_numpy(order)])
    whole = examples.batch(np.arange(len(examples)))["targets"]
    assert int((whole != IGNORED).sum()) == examples.target_tokens == examples.count_targets(np.arange(len(examples)))
    with pytest.raises(IndexError):
        examples.batch([len(examples)])


def test_a_shard_shorter_than_a_window_keeps_every_target():
    stream = pack([np.array([5, 6, 7])], 1, 9)
    examples = ShardedExamples([stream, stream], ["a", "b"], 16, eos_id=1, pad_id=0)
    for offset in range(16):
        targets = examples.batch([0, 1], offset)["targets"]
        for row in targets.tolist():
            assert sorted(row[:4]) == [1, 5, 6, 7] and set(row[4:]) == {IGNORED}


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 1000, 65_537])
def test_a_permutation_is_one(length):
    seen = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = Permutation(length, seed, epoch)
        whole = order[:]
        assert sorted(whole.tolist()) == list(range(length)) and len(order) == length
        assert np.array_equal(np.concatenate([order[start : start + 7] for start in range(0, min(length, 700), 7)]), whole[:700])
        seen.add(whole[:50].tobytes())
    if length >= 1000:
        assert len(seen) == 3
        # Neighbours go far apart, and every place is as likely early as late.
        assert np.abs(np.diff(whole)).mean() == pytest.approx(length / 3, rel=0.1)
        assert whole[: length // 2].mean() == pytest.approx(length / 2, rel=0.1)
    if length == 1000:
        assert Permutation(1000, 1337, 0)[:5].tolist() == [924, 566, 741, 695, 983], "the same on every machine"


def test_an_order_of_any_length_takes_no_memory():
    order = Permutation(10**12, 0, 0)
    chosen = order[5 * 10**11 : 5 * 10**11 + 1000]
    assert len(set(chosen.tolist())) == 1000 and 0 <= chosen.min() and chosen.max() < 10**12


def test_fit_trains_on_shards_and_continues(folder, tmp_path):
    prepared = psannLMDataPrep.from_shards(folder, max_length=16)
    options = dict(max_steps=6, eval_interval_steps=3, save_interval_steps=2, prepared=prepared)
    whole = fitted(model(vocab_size=300), checkpoint_dir=tmp_path / "whole", **options)
    assert whole.config.max_length == 16 and whole.history_[-1]["val_loss"] > 0 and whole.tokenizer.name == "simple"
    place = tmp_path / "whole" / "checkpoints" / "step-00000004"
    again = fitted(model(1, vocab_size=300), checkpoint_dir=tmp_path / "again", resume=place, **options)
    assert all(torch.equal(tensor, whole.module.state_dict()[name]) for name, tensor in again.module.state_dict().items())
    other = psannLMDataPrep.from_shards(folder, max_length=16, seed=2)
    with pytest.raises(ValueError, match="the data is not that of the run to continue"):
        fitted(model(vocab_size=300), checkpoint_dir=tmp_path / "again", resume="auto", **{**options, "prepared": other})
    assert psannLM.load(tmp_path / "whole", device="cpu").generate("The", max_new_tokens=3, seed=0) is not None


# -- the commands ---------------------------------------------------------------------------------------------------------------

SMALL = (
    "--base respsann --d-model 16 --n-layers 1 --n-heads 2 --max-length 16 --batch-tokens 64 --device cpu --amp fp32".split()
)


def test_tokenize_train_runs(tmp_path, capsys, caplog):
    write_jsonl(tmp_path / "a.jsonl")
    assert (
        main(["tokenize", "--data", str(tmp_path), "--out", str(tmp_path / "tokens"), "--tokenizer", "simple", "--workers", "1"])
        == 0
    )
    out, err = capsys.readouterr()
    assert (
        f"train: {len(TEXTS)} documents" in out and f"psann-fast train --data {tmp_path / 'tokens'}" in out and "tokenizing" in err
    )
    common = ["train", "--data", str(tmp_path / "tokens"), *SMALL, "--no-progress"]
    for name, rate in (("one", "1e-3"), ("two", "2e-3")):
        assert main([*common, "--out", str(tmp_path / "runs" / name), "--max-steps", "3", "--lr", rate]) == 0
    assert main([*common, "--out", str(tmp_path / "runs" / "two"), "--max-steps", "3", "--lr", "2e-3", "--resume", "auto"]) == 0
    assert "nothing was left to train" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert "train.lr: " in shown and "train.seed" not in shown and shown.count("\n") == 3 + shown.count("train.")
    assert main(["runs", str(tmp_path / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in found["runs"]] == [3, 3] and set(found["differences"]["train.lr"].values()) == {1e-3, 2e-3}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--val-split", "0.5"], "--val-split was decided when .* was tokenized; leave it out, or tokenize anew"),
        (["--resume", "auto"], "name the one to continue with --out"),
    ],
)
def test_what_train_refuses(folder, arguments, message, capsys):
    assert main(["train", "--data", str(folder), *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_runs_of_nothing(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0 and "no run in" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "is not a folder; pass run folders" in capsys.readouterr().err
