"""Packing: every token a target exactly once, documents apart, one shape."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from psann_fast.data import IGNORED, Examples, pack

PAD, EOS = 0, 1


def random_documents(draw: random.Random, most: int = 8, longest: int = 30, vocab: int = 50) -> list[np.ndarray]:
    lengths = [draw.randrange(1, longest) for _ in range(draw.randrange(1, most))]
    return [np.array([draw.randrange(2, vocab) for _ in range(n)], np.int32) for n in lengths]


def expected_rows(documents, window, packed, offset):
    """The specification, token by token: rows of (input, target, starts a document)."""
    stream = [EOS]
    for ids in documents:
        stream += [*ids.tolist(), EOS]
    steps = []
    for i in range(len(stream) - 1):
        steps.append((stream[i], stream[i + 1], stream[i] == EOS or stream[i - 1] == EOS))
    if packed:
        steps = steps[offset:] + steps[:offset]
        rows = [steps[i : i + window] for i in range(0, len(steps), window)]
    else:
        rows, start = [], 0
        for ids in documents:
            own = steps[start : start + len(ids) + 1]
            rows += [own[i : i + window] for i in range(0, len(own), window)]
            start += len(ids) + 1
    rows = [row + [(PAD, IGNORED, True)] * (window - len(row)) for row in rows]
    return [[(a, b, c or place == 0) for place, (a, b, c) in enumerate(row)] for row in rows]


def as_rows(batch):
    assert {name: t.dtype for name, t in batch.items()} == {
        "input_ids": torch.int64, "targets": torch.int64, "document_starts": torch.bool
    }  # fmt: skip
    columns = [batch[name].tolist() for name in ("input_ids", "targets", "document_starts")]
    return [list(zip(*row)) for row in zip(*columns)]


def check_case(draw: random.Random) -> None:
    documents = random_documents(draw)
    packed = draw.random() < 0.5
    max_length = draw.choice((1, 2, 3, 5, 16, 33, 200))
    stream = pack(documents, EOS, 50)
    assert stream.tolist() == [EOS] + [t for ids in documents for t in [*ids.tolist(), EOS]]
    examples = Examples(stream, max_length, eos_id=EOS, pad_id=PAD, pack=packed)
    longest = len(stream) - 1 if packed else max(map(len, documents)) + 1
    assert examples.window == min(max_length, longest)
    offset = draw.randrange(examples.window) if packed else 0
    everything = np.arange(len(examples))
    wanted = expected_rows(documents, examples.window, packed, offset)
    assert as_rows(examples.batch(everything, offset)) == wanted
    shuffled = draw.sample(range(len(examples)), len(examples))
    assert as_rows(examples.batch(shuffled, offset)) == [wanted[i] for i in shuffled]
    targets = examples.batch(everything, offset)["targets"]
    assert sorted(targets[targets != IGNORED].tolist()) == sorted(stream[1:].tolist())
    assert examples.target_tokens == len(stream) - 1 == int((targets != IGNORED).sum())


def test_random_documents_give_the_windows_of_the_specification():
    for seed in range(300):
        check_case(random.Random(seed))


@pytest.mark.campaign(weight=0.5)
def test_windows_of_random_documents(campaign):
    for seed in campaign:
        check_case(random.Random(seed))


def test_two_documents_by_hand():
    stream = pack([np.array([10, 11, 12]), np.array([20])], EOS, 50)
    assert stream.tolist() == [1, 10, 11, 12, 1, 20, 1]
    first, second = Examples(stream, 4, eos_id=EOS, pad_id=PAD)
    assert first["input_ids"].tolist() == [1, 10, 11, 12] and second["input_ids"].tolist() == [1, 20, 0, 0]
    assert first["targets"].tolist() == [10, 11, 12, 1] and second["targets"].tolist() == [20, 1, -100, -100]
    assert first["document_starts"].tolist() == [True, True, False, False]
    assert second["document_starts"].tolist() == [True, True, True, True], "each token of padding stands alone"
    alone = Examples(stream, 3, eos_id=EOS, pad_id=PAD, pack=False)
    assert alone.batch([0, 1, 2])["input_ids"].tolist() == [[1, 10, 11], [12, 0, 0], [1, 20, 0]]
    assert alone.batch([0, 1, 2])["targets"].tolist() == [[10, 11, 12], [1, -100, -100], [20, 1, -100]]


def test_thirty_four_tokens_fill_a_window_of_thirty_three():
    stream = pack([np.arange(2, 34)], EOS, 50)
    examples = Examples(stream, 33, eos_id=EOS, pad_id=PAD)
    assert len(stream) == 34 and len(examples) == 1 and (examples[0]["targets"] != IGNORED).all()


def test_documents_shorter_than_a_window_are_kept():
    documents = [np.full(3, token) for token in range(2, 102)]
    examples = Examples(pack(documents, EOS, 200), 64, eos_id=EOS, pad_id=PAD, pack=False)
    assert len(examples) == 100 and examples.window == 4
    assert examples.batch(np.arange(100))["input_ids"][:, 1].tolist() == list(range(2, 102))


@pytest.mark.parametrize("packed", [True, False])
def test_a_window_longer_than_the_text_shrinks_and_says_so(packed, caplog):
    stream = pack([np.array([5, 6]), np.array([7])], EOS, 50)
    assert Examples(stream, 256, eos_id=EOS, pad_id=PAD, pack=packed).window == (5 if packed else 3)
    assert "fewer than a window of 256" in caplog.text
    caplog.clear()
    Examples(stream, 3, eos_id=EOS, pad_id=PAD, pack=packed)
    assert not caplog.text


def test_epochs_cut_at_different_places_and_see_everything():
    documents = [np.arange(2 + 40 * i, 42 + 40 * i) for i in range(10)]
    stream = pack(documents, EOS, 500)
    examples = Examples(stream, 32, eos_id=EOS, pad_id=PAD, seed=7)
    firsts, offsets = set(), [examples.offset(epoch) for epoch in range(20)]
    for epoch, offset in enumerate(offsets):
        batch = examples.batch(examples.order(epoch), offset)
        targets = batch["targets"][batch["targets"] != IGNORED]
        assert sorted(targets.tolist()) == sorted(stream[1:].tolist())
        firsts.add(tuple(sorted(batch["input_ids"][:, 0].tolist())))
    assert len(set(offsets)) > 10 and len(firsts) == len(set(offsets)) and max(offsets) < 32
    assert offsets == [examples.offset(epoch) for epoch in range(20)]
    assert Examples(stream, 32, eos_id=EOS, pad_id=PAD, pack=False, seed=7).offset(3) == 0


def test_orders_are_permutations_that_depend_on_epoch_and_seed():
    examples, other = (Examples(pack([np.full(5000, 3)], EOS, 50), 5, eos_id=EOS, pad_id=PAD, seed=seed) for seed in (1337, 1338))
    order = examples.order(0)
    assert sorted(order.tolist()) == list(range(len(examples)))
    assert (order == examples.order(0)).all()
    assert (order != examples.order(1)).mean() > 0.9 < (order != other.order(0)).mean()
    assert order[:5].tolist() == [728, 991, 207, 448, 20], "the order of an epoch is the same on every machine and version"


def test_the_stream_may_be_a_memory_map(tmp_path):
    stream = pack([np.arange(2, 90), np.arange(90, 300)], EOS, 300)
    stream.tofile(tmp_path / "shard")
    mapped = np.memmap(tmp_path / "shard", stream.dtype, mode="r")
    here, there = (Examples(s, 16, eos_id=EOS, pad_id=PAD) for s in (stream, mapped))
    indices = here.order(0)
    for name, rows in here.batch(indices, 5).items():
        assert torch.equal(rows, there.batch(indices, 5)[name])
    assert there.stream is mapped, "not copied"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_sees_each_example_once(workers):
    examples = Examples(pack([np.arange(2, 400)], EOS, 400), 7, eos_id=EOS, pad_id=PAD)
    loader = torch.utils.data.DataLoader(examples, batch_size=4, num_workers=workers)
    targets = torch.cat([batch["targets"].flatten() for batch in loader])
    assert sorted(targets[targets != IGNORED].tolist()) == sorted([*range(2, 400), EOS])


def test_the_smallest_type_that_holds_the_vocabulary():
    assert pack([np.array([65535])], EOS, 65536).dtype == np.uint16
    wide = pack([np.array([65536])], EOS, 65537)
    assert wide.dtype == np.int32 and wide.tolist() == [1, 65536, 1]
    assert Examples(pack([np.array([65535])], EOS, 65536), 2, eos_id=EOS, pad_id=PAD)[0]["targets"].tolist() == [65535, 1]


def test_what_cannot_be_packed_is_refused():
    for bad in ([EOS], [5, 50], [-1]):
        with pytest.raises(ValueError, match="document 1 contains the separator 1 or an id outside 0 to 49"):
            pack([np.array([5]), np.array(bad)], EOS, 50)
    good = pack([np.array([5, 6, 7])], EOS, 50)
    for stream, message in (
        (good[1:], "between two separators"),
        (good[:-1], "between two separators"),
        (good[:1], "has 1 tokens"),
        (good[None], "one row of whole numbers"),
        (good.astype(np.float32), "one row of whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            Examples(stream, 4, eos_id=EOS, pad_id=PAD)
    with pytest.raises(ValueError, match="max_length is 0"):
        Examples(good, 0, eos_id=EOS, pad_id=PAD)
    examples = Examples(good, 2, eos_id=EOS, pad_id=PAD)
    for indices in ([2], [-1], [[0]]):
        with pytest.raises(IndexError):
            examples.batch(indices)
    with pytest.raises(IndexError):
        examples[2]
    assert torch.equal(examples[-1]["input_ids"], examples[1]["input_ids"])
    with pytest.raises(ValueError, match="offset is 2; it must be from 0 to 1"):
        examples.batch([0], 2)
    with pytest.raises(ValueError, match="offset is 1; it must be from 0 to 0"):
        Examples(good, 2, eos_id=EOS, pad_id=PAD, pack=False).batch([0], 1)
