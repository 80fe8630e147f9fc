"""Files made to do harm: each is an error within a second and 200 MB, and nothing in it is executed.

Whoever makes such a file can compute checksums, so manifests and indices here are whole.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import xxhash
from psann_fast import psannLM, psannLMDataPrep, settings
from psann_fast.config import TrainConfig, build
from psann_fast.data import load_tokenizer
from psann_fast.data.tokenizing import tokenize
from psann_fast.integrations.export import import_exported
from psann_fast.sealed import sealed
from psann_fast.train import checkpoint
from safetensors.torch import load_file, save, save_file
from tiny import SENTENCES, data, fitted, model

SECONDS, MEGABYTES = 1.0, 200
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pickle.find_class")
WATCH = {"on": False}


def _audit(event: str, arguments: tuple) -> None:
    if WATCH["on"] and event in FORBIDDEN:
        raise AssertionError(f"a file caused {event} {arguments}")


sys.addaudithook(_audit)


class Harm:
    """Unpickling this leaves a witness."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (exec, (f"open({str(self.witness)!r}, 'w')",))


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A model, a run, token shards and an exported folder, whole."""
    folder = tmp_path_factory.mktemp("originals")
    lm = fitted(model(), checkpoint_dir=folder / "run", max_steps=2, save_interval_steps=1)
    lm.save(folder / "model")
    (folder / "text.txt").write_text(" ".join(SENTENCES))
    tokenize([folder / "text.txt"], folder / "shards", tokenizer="simple", workers=1, progress=False)
    exported(lm, folder / "exported")
    return folder


def exported(lm: psannLM, folder: Path) -> None:
    """What `export` writes, without transformers."""
    c = lm.config
    folder.mkdir()
    described = dict(
        model_type="psann", base=c.base, hidden_size=c.d_model, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, intermediate_size=c.d_mlp, vocab_size=c.vocab_size,
        positional_encoding=c.positional_encoding, rotary_theta=c.rope_theta, dropout=c.dropout,
        tie_word_embeddings=c.tie_embeddings, max_position_embeddings=c.max_length, wave_kernel=c.wave_kernel,
        wave_dilations=list(c.wave_dilations),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    save_file(lm.module.state_dict(), folder / "model.safetensors")
    lm.tokenizer.save(folder / "psann_tokenizer")
    import_exported(folder, device="cpu")


def refused(action, *arguments) -> None:
    """action(*arguments) is an error that a person can read, in time, in memory, and nothing is called."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted from here on
    before, began, cpu = peak(), time.perf_counter(), time.process_time()
    WATCH["on"] = True
    try:
        with pytest.raises((ValueError, TypeError, OSError)) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action(*arguments)
    finally:
        WATCH["on"] = False
    waited, seconds, grown = time.perf_counter() - began, time.process_time() - cpu, peak() - before
    assert len(str(caught.value)) < 2000 and str(caught.value).strip()
    # The machine may be busy with something else, so what counts is the work; and nothing may wait for ever.
    assert seconds < SECONDS and waited < 20, f"{seconds:.1f} s of work, {waited:.1f} s in all until {caught.value}"
    assert grown < MEGABYTES, f"{grown:.0f} MB until {caught.value}"


def peak() -> float:
    """MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def safetensors(header: bytes | dict, body: bytes = b"", length: int | None = None) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + body


def one(shape, offsets, dtype: str = "F32") -> dict:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def many(tensors: int) -> bytes:
    entries = ",".join(f'"x{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(tensors))
    return safetensors(f"{{{entries}}}".encode())


def sparse(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    return path


# -- a model's folder -----------------------------------------------------------------------------------------------------------


def replaced(folder: Path, name: str, content: bytes) -> None:
    """One file of a saved folder replaced, its checksum as it should be."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["files"][name]
    (folder / entry["file"]).write_bytes(content)
    entry |= {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    resealed(folder / "manifest.json", manifest)


def resealed(path: Path, contents: dict) -> None:
    path.write_bytes(sealed({name: value for name, value in contents.items() if name != "xxh3_128"}))


def with_weights(content: bytes):
    return lambda folder: replaced(folder, "model.safetensors", content)


def with_options(**options):
    def change(folder: Path) -> None:
        described = json.loads(checkpoint.read(folder)["config.json"].read_text())
        described["model"] |= options
        replaced(folder, "config.json", json.dumps(described).encode())

    return change


def with_config(content: bytes):
    return lambda folder: replaced(folder, "config.json", content)


def with_tokenizer(content: bytes):
    return lambda folder: replaced(folder, "psann_tokenizer.json", content)


def described(**options) -> bytes:
    return json.dumps({"format": "psann-fast tokenizer", "version": 1, **options}).encode()


def with_entry(**changes):
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["model.safetensors"] |= changes
        resealed(folder / "manifest.json", manifest)

    return change


def with_a_link(target: str):
    def change(folder: Path) -> None:
        path = checkpoint.read(folder)["model.safetensors"]
        path.unlink()
        path.symlink_to(target)

    return change


def with_a_pipe(folder: Path) -> None:
    path = checkpoint.read(folder)["config.json"]
    path.unlink()
    os.mkfifo(path)


def with_layers_of_nothing(folder: Path) -> None:
    """As many tensors as the configuration has layers, none of the right shape."""
    count = 10_000
    header = {f"blocks.{i}.ln_1.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
    replaced(folder, "model.safetensors", safetensors(header))
    with_options(n_layers=count)(folder)


def with_a_pickle(folder: Path) -> None:
    replaced(folder, "model.safetensors", pickle.dumps(Harm(folder / "witness")))


def with_a_torch_file(folder: Path) -> None:
    torch.save({"embed.weight": Harm(folder / "witness")}, folder / "weights.pt")
    replaced(folder, "model.safetensors", (folder / "weights.pt").read_bytes())


MODELS = {
    "a pickle for weights": with_a_pickle,
    "a file of torch.save for weights": with_a_torch_file,
    "no header": with_weights(b""),
    "a header of 2^63 bytes": with_weights(safetensors(b"{}", length=1 << 63)),
    "a header of 2^40 bytes": with_weights(safetensors(b"{}", length=1 << 40)),
    "a header of brackets": with_weights(safetensors(b"[" * 1_000_000)),
    "a header that is cut": with_weights(safetensors(b'{"x": ')),
    "a header of 500,000 tensors": lambda folder: with_weights(many(500_000))(folder),
    "a header of 40,000 tensors": lambda folder: with_weights(many(40_000))(folder),
    "a negative shape": with_weights(safetensors(one([-1], [0, 4]), bytes(4))),
    "a huge shape": with_weights(safetensors(one([1 << 62, 4], [0, 4]), bytes(4))),
    "a shape of NaN": with_weights(safetensors(b'{"x": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', bytes(4))),
    "offsets outside the file": with_weights(safetensors(one([1 << 30], [0, 1 << 32]), bytes(4))),
    "offsets that go back": with_weights(safetensors(one([1], [4, 0]), bytes(4))),
    "an unknown dtype": with_weights(safetensors(one([1], [0, 4], "OBJECT"), bytes(4))),
    "a name twice": with_weights(
        safetensors(
            b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', bytes(8)
        )
    ),
    "tensors that overlap": with_weights(
        safetensors({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("x", "y")}, bytes(8))
    ),
    "two million layers": with_options(n_layers=2_000_000),
    "ten thousand layers of nothing": with_layers_of_nothing,
    "a width of 2^40": with_options(d_model=1 << 40),
    "an MLP of 2^60": with_options(d_mlp=1 << 60),
    "a vocabulary of 10^18": with_options(vocab_size=10**18),
    "a negative width": with_options(d_model=-16),
    "no heads": with_options(n_heads=0),
    "options of NaN": with_options(sine_freq_init=float("nan")),
    "an endless frequency": with_options(rope_theta=float("inf")),
    "a name of a base that is a path": with_options(base="../../evil"),
    "a list for a number": with_options(d_model=[16] * 100_000),
    "a number of 10,000 digits": with_config(b'{"model": {"d_model": ' + b"9" * 10_000 + b"}}"),
    "a configuration of brackets": with_config(b"[" * 500_000),
    "a configuration of 50 MB": with_config(b'{"model": "' + b"x" * (50 << 20) + b'"}'),
    "a tokenizer of 10^9 ids": with_tokenizer(described(name="simple", vocab_size=10**9, pad_id=0, eos_id=1, characters="")),
    "a tokenizer that names a module": with_tokenizer(described(name="os")),
    "a tokenizer that names a path": with_tokenizer(described(name="tokenizers", file="/etc/passwd")),
    "a tokenizer of 100 MB": with_tokenizer(bytes(100 << 20)),
    "a path out of the folder": with_entry(file="../../../etc/passwd"),
    "a path from the root": with_entry(file="/etc/passwd"),
    "a size of NaN": with_entry(size=float("nan")),
    "a negative size": with_entry(size=-1),
    "a size of 10^400": with_entry(size=10**400),
    "a link to what never ends": with_a_link("/dev/zero"),
    "a link to a file elsewhere": with_a_link("/etc/passwd"),
    "a link to itself": with_a_link("manifest.json/../link"),
    "a pipe that nobody writes to": with_a_pipe,
    "a manifest of 100 MB": lambda folder: sparse(folder / "manifest.json", 100 << 20) and None,
    "a manifest of brackets": lambda folder: (folder / "manifest.json").write_bytes(b"[" * 900_000) and None,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder(originals, tmp_path, name):
    folder = copied(originals / "model", tmp_path)
    MODELS[name](folder)
    refused(lambda: psannLM.load(folder, device="cpu"))
    assert not (folder / "witness").exists()


def copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


# -- a run to continue ----------------------------------------------------------------------------------------------------------


def with_state(change):
    def spoil(folder: Path) -> None:
        for step in (1, 2):
            place = folder / "checkpoints" / f"step-{step:08d}"
            state = json.loads(checkpoint.read(place)["training.json"].read_text())
            replaced(place, "training.json", json.dumps(change(state) or state).encode())

    return spoil


def with_tensors(name: str, content: bytes):
    def spoil(folder: Path) -> None:
        for step in (1, 2):
            replaced(folder / "checkpoints" / f"step-{step:08d}", name, content)

    return spoil


def with_changed_tensors(change):
    def spoil(folder: Path) -> None:
        for step in (1, 2):
            place = folder / "checkpoints" / f"step-{step:08d}"
            tensors = load_file(checkpoint.read(place)["training.safetensors"])
            replaced(place, "training.safetensors", save(change(tensors)))

    return spoil


RUNS = {
    "no state": with_state(lambda state: {"step": 2}),
    "a list for the state": with_state(lambda state: [1]),
    "a step below 0": with_state(lambda state: state.update(step=-5)),
    "a step of 10^30": with_state(lambda state: state.update(step=10**30)),
    "tokens of text": with_state(lambda state: state.update(tokens="many")),
    "tokens of NaN": with_state(lambda state: state.update(tokens=float("nan"))),
    "a guard of nothing": with_state(lambda state: state.update(guard={})),
    "options of nothing": with_state(lambda state: state.update(train=[])),
    "a best that is text": with_state(lambda state: state.update(best="low")),
    "a row that is none": with_state(lambda state: state.update(pending=[1])),
    "moments that are a pickle": with_tensors("training.safetensors", pickle.dumps([1])),
    "moments of another shape": with_changed_tensors(
        lambda t: {n: v.reshape(-1, 1) if n.startswith("optimizer") and v.dim() == 2 else v for n, v in t.items()}
    ),
    "moments of nothing": with_changed_tensors(lambda t: {n: v for n, v in t.items() if not n.startswith("optimizer")}),
    "moments of unknown names": with_changed_tensors(lambda t: {**t, "optimizer/lm_head.weight/__class__": torch.zeros(())}),
    "a random state of nothing": with_changed_tensors(lambda t: {n: v for n, v in t.items() if not n.startswith("random")}),
    "a random state of another size": with_changed_tensors(
        lambda t: {n: v[:10].clone() if n.startswith("random") else v for n, v in t.items()}
    ),
    "a state of brackets": with_tensors("training.json", b"[" * 500_000),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_to_continue(originals, tmp_path, name):
    folder = copied(originals / "run", tmp_path)
    RUNS[name](folder)
    lm, prepared = model(), data()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    weights = {n: t.clone() for n, t in lm.module.state_dict().items()}
    refused(lambda: fitted(lm, prepared, checkpoint_dir=folder, resume="auto", max_steps=4))
    assert all(torch.equal(t, weights[n]) for n, t in lm.module.state_dict().items()), "a refused run changed the model"
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}, "a refused run changed the folder"


# -- token shards, tokenizers, exported folders, YAML ---------------------------------------------------------------------------


def with_index(change):
    def spoil(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        resealed(folder / "index.json", change(index) or index)

    return spoil


def first(index: dict) -> dict:
    return index["parts"]["train"]["shards"][0]


SHARDS = {
    "a path out of the folder": with_index(lambda index: first(index).update(file="../text.txt")),
    "a path with a NUL": with_index(lambda index: first(index).update(file="a\0b")),
    "a size of NaN": with_index(lambda index: first(index).update(size=float("nan"))),
    "tokens of text": with_index(lambda index: first(index).update(tokens="12")),
    "parts in a list": with_index(lambda index: index.update(parts=[1])),
    "shards in a number": with_index(lambda index: index["parts"]["train"].update(shards=7)),
    "an entry of text": with_index(lambda index: index["parts"]["train"].update(shards=["a"])),
    "a dtype of objects": with_index(lambda index: index.update(dtype="O")),
    "a dtype of half the size": with_index(lambda index: index.update(dtype="|u1")),
    "a tokenizer elsewhere": with_index(lambda index: index.update(tokenizer={"/etc/passwd": ""})),
    "an index of brackets": lambda folder: (folder / "index.json").write_bytes(b"[" * 900_000) and None,
    "an index of 100 MB": lambda folder: sparse(folder / "index.json", 100 << 20) and None,
    "no train part": with_index(lambda index: index.update(parts={})),
    "no shards": with_index(lambda index: index["parts"]["train"].update(shards=[])),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
def test_a_folder_of_shards(originals, tmp_path, name):
    folder = copied(originals / "shards", tmp_path)
    SHARDS[name](folder)
    refused(lambda: psannLMDataPrep.from_shards(folder, max_length=16))


def library(**model_options) -> bytes:
    """A tokenizer.json."""
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], **model_options},
    }).encode()  # fmt: skip


TOKENIZERS = {
    "ids of 4 thousand million": ("t.json", library(vocab={"a": 0, "b": 4_000_000_000})),
    "merges of nothing": ("t.json", library(merges=["x y"])),
    "a model of brackets": ("t.json", b"[" * 500_000),
    "another JSON": ("t.json", b'{"a": 1}'),
    "a pickle": ("t.json", pickle.dumps([1])),
    "a pickle for SentencePiece": ("t.model", pickle.dumps([1])),
    "a length beyond the file": ("t.model", b"\x0a\xff\xff\xff\xff\x0f" + bytes(100)),
    "zeros": ("t.model", bytes(1000)),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer(tmp_path, name):
    path = tmp_path / TOKENIZERS[name][0]
    path.write_bytes(TOKENIZERS[name][1])
    refused(load_tokenizer, path)


def test_a_tokenizer_of_a_gigabyte(tmp_path):
    for name in ("t.json", "t.model", "psann_tokenizer.json"):
        path = sparse(tmp_path / name, 1 << 30)
        refused(load_tokenizer, tmp_path if name.startswith("psann") else path)


def with_json(**options):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))

    return change


def with_weight_map(files):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files})) and None


EXPORTED = {
    "two million layers": with_json(num_hidden_layers=2_000_000),
    "a width of 2^50": with_json(hidden_size=1 << 50),
    "sines in a list": with_json(sine=[1]),
    "dilations of text": with_json(wave_dilations="x" * 100_000),
    "an index that leaves the folder": with_weight_map({"x": "../y"}),
    "an index of numbers": with_weight_map([1, 2]),
    "a pickle instead of weights": lambda folder: (
        (folder / "model.safetensors").unlink(), (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(folder / "witness")))
    ) and None,
    "weights that link to what never ends": lambda folder: (
        (folder / "model.safetensors").unlink(), (folder / "model.safetensors").symlink_to("/dev/zero")
    ) and None,
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_folder(originals, tmp_path, name):
    folder = copied(originals / "exported", tmp_path)
    EXPORTED[name](folder)
    refused(lambda: import_exported(folder, device="cpu"))
    assert not (folder / "witness").exists()


def archive(path: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name.replace("__", "/"), content)
    return path


def test_a_zip_that_leaves_its_folder_writes_nothing(tmp_path):
    for name in ("../../evil", "/evil", "archive/../../evil"):
        path = archive(tmp_path / "a.pt", **{"archive__data.pkl": pickle.dumps({"state_dict": {}, "config": {}}, 2), name: b"x"})
        refused(psannLM.from_psannlm, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


def test_a_zip_of_twenty_thousand_files(tmp_path):
    path = archive(tmp_path / "a.pt", **{f"archive__data__{i}": b"" for i in range(20_000)})
    refused(psannLM.from_psannlm, path)


def laughs(depth: int, names: str = "") -> str:
    """Aliases of aliases: ten to the `depth` words when they are written out; under `names`, and then as an option's value."""
    names = names.split() or [f"a{i}" for i in range(depth)]
    lines = [f"{names[0]}: &{names[0]} lol"] + [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip(names, names[1:])]
    return "data:\n  " + "\n  ".join(lines) + f"\ntrain:\n  epochs: *{names[-1]}"


YAML = {
    "a tag that calls": "train: !!python/object/apply:os.system ['touch witness']",
    "a tag that makes an object": "model: !!python/object:psann_fast.psannLM {}",
    "aliases of aliases in an option": laughs(
        7, "seed tokenizer max_length val_split pack_sequences tokenizer_model_path tokenizer_vocab_size"
    ),
    "aliases of aliases": laughs(12),
    "an alias of itself": "train: &a [*a]",
    "an option that holds itself": "train:\n  lr: &a [*a]",
    "brackets": "[" * 100_000,
    "a number of 10,000 digits": "train:\n  epochs: " + "9" * 10_000,
    "NaN": "train:\n  lr: .nan",
    "a key that is a list": "train:\n  [1, 2]: 3",
    "a section that is a number": "train: 5",
    "a long list": "train: [" + "1," * 10_000 + "]",
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_a_yaml_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.yaml"
    path.write_text(YAML[name])
    refused(lambda: build(TrainConfig, "train", settings.load_file(path).get("train", {})))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.yaml"]


def test_a_yaml_file_of_bytes_and_of_a_gigabyte(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"train: \xff")
    refused(settings.load_file, path)
    refused(settings.load_file, sparse(path, 1 << 30))


def test_the_table_is_long_enough_and_the_watch_sees_something(tmp_path):
    assert len(MODELS) + len(RUNS) + len(SHARDS) + len(TOKENIZERS) + len(EXPORTED) + len(YAML) >= 100
    pickle.loads(pickle.dumps(Harm(tmp_path / "witness")))
    assert (tmp_path / "witness").exists(), "the payload does no harm, so the tests above show nothing"
    WATCH["on"] = True
    try:
        with pytest.raises(AssertionError, match="caused os.system"):
            os.system("true")
    finally:
        WATCH["on"] = False
    with pytest.raises(pytest.fail.Exception):
        refused(lambda: None)
    with pytest.raises(AssertionError, match="MB until"):
        refused(lambda: (_ for _ in ()).throw(ValueError(f"{len(bytearray(300 << 20))}")))
