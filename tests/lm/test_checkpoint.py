"""A model folder is always one whole version: nothing damaged loads, and a save that fails leaves the version before."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil

import pytest
import torch
from psann_fast import psannLM
from psann_fast.sealed import sealed
from psann_fast.train import checkpoint
from psann_fast.train.checkpoint import CheckpointError
from safetensors.torch import save_file
from tiny import data, fitted, model, tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a fitted model that was saved twice, and the model."""
    folder = tmp_path_factory.mktemp("saved")
    lm = fitted(model(seed=1), max_steps=1)
    lm.save(folder)
    fitted(lm, max_steps=1).save(folder)
    return folder, lm


def fingerprint(lm: psannLM):
    """Everything that a saved model is, to compare."""
    files = {} if lm.tokenizer is None else lm.tokenizer.to_files()
    params = {name: value for name, value in lm.get_params().items() if name not in ("backend", "device")}
    return params, files, {name: t.numpy().tobytes() for name, t in lm.module.state_dict().items()}


def copy_of(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved[0], folder)
    return folder


def refused(folder, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        psannLM.load(folder, device="cpu")
    message = str(caught.value)
    assert all(word in message for word in words), message


def write_parts(folder, **contents: str) -> None:
    checkpoint.write(folder, {f"{name}.txt": lambda path, text=text: path.write_text(text) for name, text in contents.items()})


def contents(folder) -> dict[str, str]:
    return {name: path.read_text() for name, path in checkpoint.read(folder).items()}


# -- whole --------------------------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved(saved):
    folder, lm = saved
    assert fingerprint(psannLM.load(folder, device="cpu")) == fingerprint(lm)


@pytest.mark.parametrize(
    "options",
    [
        dict(base="waveresnet"),
        dict(tie_embeddings=True),
        dict(positional_encoding="alibi", n_kv_heads=1),
        dict(sine_freq_bounds=(0.5, None), sine_learnable=("damping",), sine_mode="relu", max_length=9),
    ],
    ids=str,
)
def test_every_kind_of_model_survives(tmp_path, options):
    lm = model(**options)
    lm.save(tmp_path)
    state = torch.random.get_rng_state()
    loaded = psannLM.load(tmp_path, device="cpu")
    assert torch.equal(state, torch.random.get_rng_state()), "loading moved the caller's random state"
    assert fingerprint(loaded) == fingerprint(lm) and loaded.tokenizer is None
    assert [p.requires_grad for p in loaded.module.parameters()] == [p.requires_grad for p in lm.module.parameters()]
    with torch.no_grad():
        assert torch.equal(loaded.module(tokens(1, 9)), lm.module(tokens(1, 9)))
    assert (loaded.module.lm_head.weight is loaded.module.embed.weight) == lm.config.tie_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_models_dtype_survives(tmp_path, dtype):
    lm = model()
    lm.module.to(dtype)
    lm.save(tmp_path)
    loaded = psannLM.load(tmp_path, device="cpu")
    assert {p.dtype for p in loaded.module.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(loaded.module(tokens(1, 9)), lm.module(tokens(1, 9)))


def test_only_the_newest_generation_stays(tmp_path):
    lm = fitted(model(), max_steps=1)
    names = []
    for _ in range(3):
        lm.save(tmp_path)
        names.append(sorted(path.name for path in tmp_path.iterdir()))
    assert names == [
        sorted(
            [
                "manifest.json",
                *(
                    f"{stem}-00000{n}.{end}"
                    for stem, end in (("model", "safetensors"), ("config", "json"), ("psann_tokenizer", "json"))
                ),
            ]
        )
        for n in (1, 2, 3)
    ]


def test_files_of_others_in_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for text in ("one", "two"):
        write_parts(tmp_path, a=text)
    assert (tmp_path / "notes.txt").read_text() == "mine" and contents(tmp_path) == {"a.txt": "two"}


def test_a_folder_holds_no_pickle(saved):
    folder, _ = saved
    for path in folder.iterdir():
        assert path.suffix in (".safetensors", ".json") and not path.read_bytes().startswith((b"\x80", b"PK"))


# -- damaged ------------------------------------------------------------------------------------------------------------------


def damages(path, draw: random.Random, count: int):
    """Byte strings in place of the file's content: cut short, longer, one bit turned."""
    content = path.read_bytes()
    yield b""
    yield content[:-1]
    yield content + b"\0"
    for _ in range(count):
        yield content[: draw.randrange(len(content))]
        place = draw.randrange(len(content))
        yield content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def check_damage(folder, path, content: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        with pytest.raises(CheckpointError) as caught:
            psannLM.load(folder, device="cpu")
        assert "\n" not in str(caught.value)
    finally:
        path.write_bytes(whole)


def test_damage_to_any_file_is_found(saved, tmp_path):
    folder, draw = copy_of(saved, tmp_path), random.Random(0)
    for path in sorted(folder.iterdir()):
        for content in damages(path, draw, 120 if path.name == "manifest.json" else 15):
            check_damage(folder, path, content)
    assert fingerprint(psannLM.load(folder, device="cpu")) == fingerprint(saved[1])


def test_a_manifest_whose_generation_was_changed_does_not_cost_the_next_save_its_files(tmp_path):
    """With the generation one lower, the next save wrote over the files of this one, and then removed them as the older ones."""
    for text in ("one", "two", "three"):
        write_parts(tmp_path, a=text)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"generation": 3', '"generation": 2'))
    for call in (contents, lambda folder: write_parts(folder, a="four")):
        with pytest.raises(CheckpointError, match="manifest.json is damaged"):
            call(tmp_path)
    assert (tmp_path / "a-000003.txt").read_text() == "three"


@pytest.mark.campaign(weight=1)
def test_damage_found(campaign, saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    for seed in campaign:
        draw = random.Random(seed)
        path = draw.choice(sorted(folder.iterdir()))
        check_damage(folder, path, draw.choice(list(damages(path, draw, 6))))


def test_files_of_one_version_in_another(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        model(seed=seed).save(tmp_path / name)
    shutil.copy(tmp_path / "one" / "model-000001.safetensors", tmp_path / "two" / "model-000001.safetensors")
    refused(tmp_path / "two", "model-000001.safetensors", "does not match its checksum")


def test_a_missing_file_is_named(saved, tmp_path):
    for name in ("model-000002.safetensors", "config-000002.json", "psann_tokenizer-000002.json"):
        folder = copy_of(saved, tmp_path)
        (folder / name).unlink()
        refused(folder, name, "is missing, though manifest.json lists it; restore the file, or load another checkpoint")


def test_what_is_no_model_folder_says_so(tmp_path):
    refused(tmp_path / "none", "is not a folder; pass the folder that save() wrote")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is not a folder")
    refused(tmp_path, "has no manifest.json, so it is not a saved psann-fast model")
    for content in ("{}", "[]", '{"format": "web app"}', "5"):
        (tmp_path / "manifest.json").write_text(content)
        refused(tmp_path, "manifest.json is not a psann-fast manifest; pass the folder that save() wrote")


def test_saving_over_a_manifest_of_others_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "web app"}')
    with pytest.raises(CheckpointError, match="is not a psann-fast manifest"):
        model().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def change_manifest(folder, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["xxh3_128"]  # whoever means harm can compute it anew
    change(manifest)
    path.write_bytes(sealed(manifest))


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda m: m.update(version=2), "has format version 2; this psann-fast reads version 1: install the one that wrote it"),
        (lambda m: m.update(version=None), "has format version None"),
        (lambda m: m.update(files=[]), "is damaged"),
        (lambda m: m.update(generation="2"), "is damaged"),
        (lambda m: m["files"].update({"config.json": "config-000002.json"}), "is damaged"),
        (lambda m: m["files"]["config.json"].pop("size"), "is damaged"),
        (lambda m: m["files"]["config.json"].update(xxh3_128=7), "is damaged"),
        (lambda m: m["files"].pop("config.json"), "does not hold a usable model: 'config.json'"),
        (lambda m: m["files"].pop("psann_tokenizer.json"), "does not hold a usable model: 'psann_tokenizer.json'"),
    ],
)
def test_manifests_that_are_wrong(saved, tmp_path, change, word):
    folder = copy_of(saved, tmp_path)
    change_manifest(folder, change)
    refused(folder, word)


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff\xfe", b'{"format": "psann-fast", "generation": ' + b"9" * 5000 + b"}", b"[" * 100_000],
    ids=["cut", "bytes", "digits", "depth"],
)
def test_manifests_that_are_no_json(saved, tmp_path, content):
    folder = copy_of(saved, tmp_path)
    (folder / "manifest.json").write_bytes(content)
    refused(folder, "manifest.json is damaged; load another checkpoint")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.txt",
        "/etc/hostname",
        "a/b.txt",
        "..",
        ".",
        "",
        "a\\b",
        "secret.txt\n",
        ".hidden",
        "sub/../secret.txt",
        "manifest.json",
    ],
)
def test_a_manifest_reaches_nothing_outside_its_folder(tmp_path, name):
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "model"
    write_parts(folder, a="text")
    change_manifest(folder, lambda m: m["files"]["a.txt"].update(file=name))
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        checkpoint.read(folder)
    # Nor does the next save, which removes the files of the version before.
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        write_parts(folder, a="new")
    assert (tmp_path / "secret.txt").read_text() == "secret"


# -- configurations that do not fit the weights ---------------------------------------------------------------------------------


def rewrite_config(folder, change) -> None:
    """A folder whose checksums are right and whose configuration is not: what a hostile or careless hand makes."""
    parts = checkpoint.read(folder)
    described = json.loads(parts["config.json"].read_text())
    described = change(described) or described
    kept = {name: path.read_bytes() for name, path in parts.items()}
    kept["config.json"] = json.dumps(described).encode()
    checkpoint.write(folder, {name: lambda path, content=content: path.write_bytes(content) for name, content in kept.items()})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d["model"].update(n_layers=2_000_000), ["n_layers is 2000000, but the weights hold only"]),
        (lambda d: d["model"].update(n_layers=2), ["blocks.1"]),
        (lambda d: d["model"].update(d_mlp=10**9), ["blocks.0.mlp", "of another shape than the configuration says"]),
        (lambda d: d["model"].update(vocab_size=10**12), ["embed.weight"]),
        (lambda d: d["model"].update(base="other"), ["base is 'other'"]),
        (lambda d: d["model"].update(colour="red"), ["has no option 'colour'"]),
        (lambda d: d["model"].update(d_model="16"), ["d_model is '16'"]),
        (lambda d: d.pop("model") and None, ["'model'"]),
        (lambda d: d.update(tokenizer=["manifest.json"]), ["'manifest.json'"]),
        (lambda d: [1, 2], ["does not hold a usable model"]),
        (lambda d: d.update(model=[1]), ["does not hold a usable model"]),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights(saved, tmp_path, change, words):
    folder = copy_of(saved, tmp_path)
    rewrite_config(folder, change)
    refused(folder, *words, "load another checkpoint")


def test_weights_of_whole_numbers(saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    weights = {name: tensor.to(torch.int64) for name, tensor in saved[1].module.state_dict().items()}
    parts = {
        name: lambda path, content=path.read_bytes(): path.write_bytes(content) for name, path in checkpoint.read(folder).items()
    }
    checkpoint.write(folder, parts | {"model.safetensors": lambda path: save_file(weights, path)})
    refused(folder, "does not hold a usable model", "load another checkpoint")


def test_weights_that_are_no_safetensors(saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    for content in (b"", b"\x80\x04.", b"\xff" * 8 + b"{}", (1 << 40).to_bytes(8, "little") + b"{"):
        parts = {name: path.read_bytes() for name, path in checkpoint.read(folder).items()} | {"model.safetensors": content}
        checkpoint.write(folder, {name: lambda path, content=content: path.write_bytes(content) for name, content in parts.items()})
        refused(folder, "does not hold a usable model", "load another checkpoint")


# -- a save that fails ----------------------------------------------------------------------------------------------------------


def test_a_model_of_too_many_tensors_is_neither_saved_nor_trained(tmp_path, monkeypatch):
    """It could be saved and not loaded again."""
    lm = model()
    count = len(lm.module.state_dict())
    monkeypatch.setattr(checkpoint, "MOST_TENSORS", count)
    lm.save(tmp_path / "most")
    assert len(psannLM.load(tmp_path / "most", device="cpu").module.state_dict()) == count
    monkeypatch.setattr(checkpoint, "MOST_TENSORS", count - 1)
    for keep in (lambda: lm.save(tmp_path / "more"), lambda: fitted(lm, max_steps=1, checkpoint_dir=tmp_path / "more")):
        with pytest.raises(ValueError, match=f"the model has {count} tensors, and a saved model can have {count - 1}"):
            keep()
    assert not (tmp_path / "more").exists()


def test_a_writer_that_fails_leaves_the_version_before(tmp_path):
    write_parts(tmp_path, a="old a", b="old b")

    def fails(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "no space left")

    for parts in ({"a.txt": fails}, {"a.txt": lambda path: path.write_text("new a"), "b.txt": fails}):
        with pytest.raises(OSError):
            checkpoint.write(tmp_path, parts)
        assert contents(tmp_path) == {"a.txt": "old a", "b.txt": "old b"}
    # The next one takes the place of what it left.
    write_parts(tmp_path, a="new a", b="new b")
    assert contents(tmp_path) == {"a.txt": "new a", "b.txt": "new b"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-000002.txt", "b-000002.txt", "manifest.json"]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_failing_system_call_leaves_a_whole_version(tmp_path, monkeypatch, call):
    """Whichever call of its kind fails: the old version until the manifest is renamed, the new one afterwards."""
    real = getattr(os, call)
    for failing in range(20):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        write_parts(tmp_path / "m", a="old a", b="old b")
        count = iter(range(100))

        def sometimes(*args, **options):
            if next(count) == failing:
                raise OSError(errno.EIO, "input/output error")
            return real(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, sometimes)
            try:
                write_parts(tmp_path / "m", a="new a", b="new b")
                failed = False
            except OSError:
                failed = True
        held = contents(tmp_path / "m")
        if not failed:
            assert held == {"a.txt": "new a", "b.txt": "new b"} and failing > 0
            return
        assert held in ({"a.txt": "old a", "b.txt": "old b"}, {"a.txt": "new a", "b.txt": "new b"})
    raise AssertionError("the call never stopped failing")


def test_files_reach_the_disk_before_the_manifest_names_them(tmp_path, monkeypatch):
    order, opened = [], {}
    real_open, real_fsync, real_replace = os.open, os.fsync, os.replace

    def noted_open(path, *args, **options):
        descriptor = real_open(path, *args, **options)
        opened[descriptor] = os.path.basename(path)
        return descriptor

    monkeypatch.setattr(os, "open", noted_open)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append(f"flush {opened[descriptor]}"), real_fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), real_replace(a, b)))
    write_parts(tmp_path / "m", a="a", b="b")
    assert order == ["flush a-000001.txt", "flush b-000001.txt", "flush manifest.json.new", "rename", "flush m"]


def test_a_model_that_fails_to_save_can_still_be_loaded(saved, tmp_path, monkeypatch):
    folder = copy_of(saved, tmp_path)
    lm = psannLM.load(folder, device="cpu")
    wanted, before = fingerprint(lm), sorted(path.name for path in folder.iterdir())
    fitted(lm, data(), max_steps=1)

    def no_space(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_tensors", no_space)
    with pytest.raises(
        OSError, match=r"cannot save to .*copy \(.*No space left on device\); [\d,]{6,} bytes are needed and [\d,]+ are free"
    ) as caught:
        lm.save(folder)
    assert caught.value.errno == errno.ENOSPC and sorted(p.name for p in folder.iterdir()) == before
    assert fingerprint(psannLM.load(folder, device="cpu")) == wanted != fingerprint(lm)
