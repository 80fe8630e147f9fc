"""psannlm's models run here: files that the installed package writes, the older format, tokenizers; and files that try things."""

from __future__ import annotations

import io
import pickle
import time
import warnings
import zipfile
from pathlib import Path

import psannlm
import pytest
import torch
from psann_fast import cli, psannLM
from psann_fast.integrations.torch_file import TorchFile, UnsafeFile
from psann_fast.integrations.upstream import BOS_NOTE, convert
from psannlm.architectures import LMArchitectureConfig, LMConfig, LMTemporalConfig, build_lm_model
from psannlm.lm.data.tokenizer import Tokenizer, TokenizerConfig

TEXTS = ["The river runs past the mill.", "The mill grinds corn; the village eats bread, mostly. Nobody minds!"] * 30
UNSEEN = ["The corn runs.", "a mill  by \u00e9 river", "", "[EOS] the", "Z"]
POSITIONS = ["rope", "alibi", "sinusoidal"]
EVERY_ARCHITECTURE = pytest.mark.parametrize("kind", ["residual", "wave"])


def theirs(kind: str = "residual", positions: str = "rope", vocab_size: int = 40, **architecture) -> torch.nn.Module:
    """A psannlm transformer whose every parameter differs from its initial value."""
    preset = LMArchitectureConfig.wave if kind == "wave" else LMArchitectureConfig._residual
    torch.manual_seed(0)
    config = LMConfig(
        architecture=preset(**architecture), d_model=16, n_layers=2, n_heads=2, d_mlp=24, vocab_size=vocab_size,
        positional_encoding=positions
    )  # fmt: skip
    module = build_lm_model(config).model.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def estimator(module: torch.nn.Module, tokenizer: Tokenizer | None = None) -> psannlm.PSANNLM:
    model = psannlm.PSANNLM(config=module.cfg, device="cpu")
    model._model, model._tokenizer = module, tokenizer
    return model


def imported(source, **options) -> psannLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return psannLM.from_psannlm(source, device="cpu", **options)


@torch.no_grad()
def assert_same_logits(ours: psannLM, module: torch.nn.Module, tolerance: float = 1e-5) -> None:
    ids = torch.randint(0, ours.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.module(ids), module(ids), rtol=tolerance, atol=tolerance)


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_saved_model_gives_the_same_logits_before_and_after_our_own_save(kind, positions, tmp_path):
    module = theirs(kind, positions)
    estimator(module).save(str(tmp_path / "model.pt"))
    ours = imported(tmp_path / "model.pt")
    assert ours.config.base == "respsann" and ours.config.positional_encoding == positions
    assert_same_logits(ours, module)
    ours.save(tmp_path / "ours")
    assert_same_logits(psannLM.load(tmp_path / "ours", device="cpu"), module)
    assert_same_logits(imported(module), module)


def test_decay_mode_bounds_and_what_learns_carry_over(tmp_path):
    activation = {
        "kind": "psann",
        "decay_mode": "relu",
        "learnable": ("frequency",),
        "bounds": {"decay": (0.02, None), "frequency": (0.9, 1.05)},
    }
    module = theirs(activation=activation)
    estimator(module).save(str(tmp_path / "model.pt"))
    for source in (tmp_path / "model.pt", module):
        ours = imported(source)
        assert (ours.config.sine_mode, ours.config.sine_learnable) == ("relu", ("frequency",))
        assert ours.config.sine_bounds == {"frequency": (0.9, 1.05), "damping": (0.02, None)}
        assert_same_logits(ours, module)


def test_a_trainer_checkpoint_and_the_tokenizer_of_a_trained_model(tmp_path):
    data = psannlm.PSANNLMDataPrep(TEXTS, tokenizer="simple", max_length=16)
    model = psannlm.PSANNLM(config=LMConfig(architecture="wave", d_model=16, n_layers=1, n_heads=2, d_mlp=24), device="cpu")
    model.fit(
        data,
        train=dict(
            epochs=1, batch_tokens=512, amp="fp32", checkpoint_dir=str(tmp_path), save_interval_steps=2, dataloader_num_workers=0
        ),
    )
    model.save(str(tmp_path / "model.pt"))
    module = model._model.eval()
    with pytest.warns(UserWarning, match="the optimizer's state, its schedule and the place in the data stay behind"):
        ours = psannLM.from_psannlm(tmp_path / "final.pt", device="cpu")
    assert_same_logits(ours, module)
    assert ours.tokenizer is None

    ours = imported(tmp_path / "model.pt")
    assert_same_logits(ours, module)
    assert isinstance(ours.generate("The river", max_new_tokens=5, seed=1), str)
    assert ours.score(["The river runs."])["tokens"] == 15


def fitted(backend: str, **options) -> Tokenizer:
    size = {} if backend == "simple" else {"vocab_size": 90}
    tokenizer = Tokenizer(TokenizerConfig(backend=backend, **size, **options))
    tokenizer.fit(TEXTS)
    return tokenizer


@pytest.mark.parametrize("backend, options", [("simple", {}), ("sentencepiece", {}), ("tokenizers", {"hf_passthrough_ids": True})])
def test_a_tokenizer_gives_every_text_the_same_ids(backend, options, tmp_path):
    tokenizer = fitted(backend, **options)
    estimator(theirs(vocab_size=tokenizer.vocab_size), tokenizer).save(str(tmp_path / "model.pt"))
    with pytest.warns(UserWarning, match="opens every text with its id 1"):
        ours = psannLM.from_psannlm(tmp_path / "model.pt", device="cpu")
    ours.save(tmp_path / "ours")
    loaded = psannLM.load(tmp_path / "ours", device="cpu")
    for text in TEXTS + UNSEEN:
        if backend == "tokenizers" and "[EOS]" in text:
            continue  # theirs turns these five characters into the special id, ours does not
        ids = tokenizer.encode(text, add_specials=False)
        assert ours.tokenizer.encode(text) == ids and loaded.tokenizer.encode(text) == ids, text
    assert (ours.tokenizer.pad_id, ours.tokenizer.eos_id) == (tokenizer.pad_id, tokenizer.eos_id)


def test_a_tokenizer_that_renumbers_its_ids_stays_behind(tmp_path):
    tokenizer = fitted("tokenizers")
    estimator(theirs(vocab_size=tokenizer.vocab_size), tokenizer).save(str(tmp_path / "model.pt"))
    with pytest.warns(UserWarning, match="its tokenizer does not carry over: it renumbers the ids"):
        assert psannLM.from_psannlm(tmp_path / "model.pt", device="cpu").tokenizer is None


# -- 0.12 -------------------------------------------------------------------------------------------------------------------------


def older_file(path: Path, module: torch.nn.Module, **config) -> Path:
    """What psannlm 0.12 wrote: its wheels are empty, so this fixture stands for them (names as in its documentation)."""
    cfg = module.cfg
    described = dict(
        base="waveresnet", d_model=cfg.d_model, n_layers=cfg.n_layers, n_heads=cfg.n_heads, d_mlp=cfg.d_mlp,
        vocab_size=cfg.vocab_size, rope=cfg.positional_encoding == "rope", positional_encoding=cfg.positional_encoding,
        overrides={},
        sine=dict(
            amp_init=1.0, amp_init_std=0.0, freq_init=1.0, freq_init_std=0.0, damp_init=0.01, damp_init_std=0.0, trainable=True
        ),
    )  # fmt: skip
    torch.save({"config": described | config, "state_dict": module.state_dict()}, path)
    return path


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("base", ["respsann", "waveresnet"])
def test_a_model_of_0_12(base, positions, tmp_path):
    module = theirs(positions=positions)
    ours = imported(older_file(tmp_path / "old.pt", module, base=base))
    assert ours.config.learnable_sine == ("amplitude", "frequency", "damping")
    assert_same_logits(ours, module)
    ours.save(tmp_path / "ours")
    assert_same_logits(psannLM.load(tmp_path / "ours", device="cpu"), module)


def test_a_sine_that_did_not_learn_in_0_12_does_not_learn_here(tmp_path):
    ours = imported(older_file(tmp_path / "old.pt", theirs(), sine={"trainable": False}))
    assert ours.config.learnable_sine == ()


def test_a_trainer_checkpoint_of_0_12_must_be_told_what_it_does_not_say(tmp_path):
    module, path = theirs(positions="alibi"), tmp_path / "final.pt"
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save({"state": {"step": 3, "epoch": 1}, "model": state, "optim": optimizer.state_dict(), "cfg": {"lr": 1e-3}}, path)
    with pytest.raises(ValueError, match="the file does not say n_heads, and its weights do not show it; pass n_heads="):
        convert(path)
    assert_same_logits(imported(path, n_heads=2, positional_encoding="alibi"), module)


# -- what does not carry over -----------------------------------------------------------------------------------------------------


def test_the_wave_branch_is_refused_unless_dropped_by_name(tmp_path):
    module = theirs("wave", temporal=LMTemporalConfig(mode="interleave"))
    estimator(module).save(str(tmp_path / "model.pt"))
    with pytest.raises(ValueError, match=r"blocks.0.wave.* looks at later tokens.*drop='wave' leaves the branch behind"):
        psannLM.from_psannlm(tmp_path / "model.pt")
    with pytest.warns(UserWarning, match="the wave branch was left behind as asked .*; the logits differ"):
        ours = psannLM.from_psannlm(tmp_path / "model.pt", drop=["wave"], device="cpu")
    for block in module.blocks:
        block.wave = None
    assert_same_logits(ours, module)


@pytest.mark.parametrize(
    "kind, architecture, message",
    [
        ("wave", {"temporal": LMTemporalConfig(mode="replace")}, "no tensor blocks.0.mlp.fc1.weight"),
        ("residual", {"activation": {"kind": "gelu"}}, "no tensor blocks.0.mlp.act._A"),
        ("residual", {"residual": {"norm": "none"}}, "norm is 'none'; only 'rms'"),
        ("residual", {"residual": {"norm": "layer"}}, "blocks.0.norm1.weight has no counterpart here"),
        ("residual", {"spectral": {}}, "blocks.0.spectral.* has no counterpart here"),
    ],
)
def test_other_variants_are_refused_with_the_reason(kind, architecture, message):
    with pytest.raises(ValueError, match=message):
        convert(theirs(kind, **architecture), drop=["wave"])


def test_what_acts_in_training_alone_is_named(tmp_path):
    module = theirs(residual={"norm": "rms", "drop_path": 0.25})
    notes = convert(module).notes
    assert any("drop_path=0.25" in note for note in notes) and any("no tokenizer" in note for note in notes)
    assert BOS_NOTE not in notes


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"drop": ["waves"]}, ValueError, r"drop names \['waves'\]; the one part that can be left behind is 'wave'"),
        ({"n_heads": 4}, ValueError, "n_heads=4 was passed, but the file says 2"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        convert(theirs(), **arguments)


@pytest.mark.parametrize("source, error", [(torch.nn.Linear(2, 2), TypeError), (3, TypeError), ("missing.pt", FileNotFoundError)])
def test_other_sources(source, error):
    with pytest.raises(error, match="from_psannlm"):
        convert(source)


def test_the_command_line_imports(tmp_path, capsys):
    module = theirs()
    estimator(module).save(str(tmp_path / "model.pt"))
    assert cli.main(["import", str(tmp_path / "model.pt"), "--out", str(tmp_path / "ours")]) == 0
    printed = capsys.readouterr()
    assert "without a tokenizer" in printed.out and "note: from_psannlm: it has no tokenizer" in printed.err
    assert_same_logits(psannLM.load(tmp_path / "ours", device="cpu"), module)
    assert cli.main(["import", str(tmp_path / "model.pt"), "--out", str(tmp_path / "x"), "--drop", "head"]) == 2
    assert "drop names ['head']" in capsys.readouterr().err


def test_the_command_line_leaves_the_wave_branch_behind_by_name_alone(tmp_path, capsys):
    module = theirs("wave", temporal=LMTemporalConfig(mode="interleave"))
    estimator(module).save(str(tmp_path / "model.pt"))
    arguments = ["import", str(tmp_path / "model.pt"), "--out", str(tmp_path / "ours")]
    assert cli.main(arguments) == 2
    assert "looks at later tokens" in capsys.readouterr().err and not (tmp_path / "ours").exists()
    assert cli.main([*arguments, "--drop", "wave"]) == 0
    assert "note: from_psannlm: the wave branch was left behind as asked" in capsys.readouterr().err
    for block in module.blocks:
        block.wave = None
    assert_same_logits(psannLM.load(tmp_path / "ours", device="cpu"), module)


# -- hostile files -----------------------------------------------------------------------------------------------------------------


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def rewritten(source: Path, target: Path, change, compression: int = zipfile.ZIP_STORED) -> Path:
    """`source` with each record replaced by change(name, content); None leaves it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


@pytest.fixture
def good(tmp_path) -> Path:
    return older_file(tmp_path / "good.pt", theirs())


def with_pickle(good: Path, content: bytes) -> Path:
    return rewritten(good, good.with_name("bad.pt"), lambda name, old: content if name.endswith("data.pkl") else old)


def executed(*arguments):
    raise AssertionError("the file's function was called")


@pytest.mark.parametrize(
    "function, name", [(executed, "executed"), (eval, "eval"), (open, "open"), (torch.load, "torch"), (getattr, "getattr")]
)
@pytest.mark.parametrize("place", ["top", "config", "state_dict", "optim", "tokenizer"])
def test_a_pickle_that_calls_something_executes_nothing(function, name, place, good, tmp_path):
    witness = tmp_path / "witness"
    call = Call(function, str(witness), "w") if function is open else Call(function, f"open({str(witness)!r}, 'w')")
    content = call if place == "top" else {"config": {}, "state_dict": {}, place: {"x": call}}
    for protocol in (2, 5):
        with pytest.raises(UnsafeFile):
            convert(with_pickle(good, pickle.dumps(content, protocol)))
        with pytest.raises(UnsafeFile, match=f"call .*{name}.*nothing was executed"):
            convert(with_pickle(good, pickle.dumps(content, 2)))
    assert not witness.exists()


def test_a_pickle_that_calls_something_ends_the_command(good, tmp_path, capsys):
    witness = tmp_path / "witness"
    path = with_pickle(good, pickle.dumps({"state_dict": {}, "config": Call(eval, f"open({str(witness)!r}, 'w')")}, 2))
    assert cli.main(["import", str(path), "--out", str(tmp_path / "ours")]) == 2
    assert "nothing was executed" in capsys.readouterr().err
    assert not witness.exists() and not (tmp_path / "ours").exists()


def test_the_payloads_do_execute_when_unpickled():
    """Otherwise the test above would show nothing."""
    with pytest.raises(AssertionError, match="was called"):
        pickle.loads(pickle.dumps({"config": Call(executed, "x")}, 2))


def nested(depth: int) -> list:
    """2 ** depth lists to walk, and `depth` to store."""
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


def endless() -> list:
    value: list = []
    value.append(value)
    return value


class Attributes:
    pass


PICKLES = {
    "empty": b"",
    "no end": pickle.dumps({"a": 1}, 2)[:-1],
    "cut short": pickle.dumps({"a": "x" * 1000}, 2)[:100],
    "stack underflow": b"\x80\x02s.",
    "pop of no mark": b"\x80\x02t.",
    "unknown memo": b"\x80\x02h\x05.",
    "noise": bytes(range(256)),
    "a class": pickle.dumps({"config": Attributes()}, 2),
    "an extension code": b"\x80\x02\x82\x01.",
    "a text opcode": pickle.dumps({"a": 1}, 0),
    "a huge length": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a huge memo index": b"\x80\x02]r\xff\xff\xff\x7f.",
    "two to the sixty lists": pickle.dumps({"config": nested(60), "state_dict": {}}, 2),
    "a list in itself": pickle.dumps({"config": endless(), "state_dict": {}}, 2),
    "a key of tuples": pickle.dumps({(1, 2): 3}, 2),
    "no dict": pickle.dumps([1, 2], 2),
    "other keys": pickle.dumps({"weights": {}}, 2),
    "weights that are none": pickle.dumps({"config": {}, "state_dict": {"embed.weight": 3}}, 2),
    "no weights": pickle.dumps({"config": {}, "state_dict": {}}, 2),
    "options that are none": pickle.dumps({"config": [1], "state_dict": {}}, 2),
    "a long integer": pickle.dumps({"config": 1 << 4000, "state_dict": {}}, 2),
    "a storage of nothing": b"\x80\x02}X\x01\x00\x00\x00aNQs.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_damaged_pickle_is_an_error_in_a_second(name, good):
    path = with_pickle(good, PICKLES[name])
    began = time.perf_counter()
    with pytest.raises(ValueError, match="bad.pt|from_psannlm"):
        convert(path)
    assert time.perf_counter() - began < 1


def test_a_record_of_another_size_is_refused(good):
    for change in (lambda old: old[:-4], lambda old: old + b"\0" * 4, lambda old: b"", lambda old: None):
        path = rewritten(good, good.with_name("bad.pt"), lambda name, old: change(old) if name.endswith("data/3") else old)
        with pytest.raises(UnsafeFile, match="record .*data/3.* has .* bytes, and should have"):
            convert(path)


@pytest.mark.parametrize(
    "shape, stride, offset",
    [((40, 17), (16, 1), 0), ((40, 16), (17, 1), 0), ((40, 16), (16, 1), 1), ((40, 16), (-16, 1), 639), ((1 << 40, 16), (0, 0), 0)],
)
def test_a_tensor_outside_its_record_is_refused(shape, stride, offset, good, monkeypatch):
    content = torch.load(good, weights_only=True)
    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", lambda t, protocol: reduced(t, shape, stride, offset))
    content["state_dict"] = {"embed.weight": torch.zeros(40, 16)}
    torch.save(content, good)
    monkeypatch.undo()
    with pytest.raises(UnsafeFile, match="reaches outside its record|they overlap"):
        convert(good)


def reduced(tensor, shape, stride, offset):
    storage = torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
    return torch._utils._rebuild_tensor_v2, (storage, offset, shape, stride, False, {})


def test_other_kinds_of_file_are_refused(good, tmp_path):
    bad = tmp_path / "bad.pt"
    content = good.read_bytes()
    for number, data in enumerate(
        (b"", b"\x80\x02}q\0.", content[: len(content) // 2], b"PK\x03\x04" + bytes(100), pickle.dumps({"a": 1}))
    ):
        bad.write_bytes(data)
        with pytest.raises(UnsafeFile, match="not a zip of torch.save"):
            convert(bad)
    rewritten(good, bad, lambda name, old: old, zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsafeFile, match="is compressed or encrypted"):
        convert(bad)
    rewritten(good, bad, lambda name, old: b"big" if name.endswith("byteorder") else old)
    with pytest.raises(UnsafeFile, match="big-endian"):
        convert(bad)
    rewritten(good, bad, lambda name, old: None if name.endswith("data.pkl") else old)
    with pytest.raises(UnsafeFile, match="holds 0 files named data.pkl"):
        convert(bad)


def test_options_that_contradict_the_weights_are_refused(tmp_path):
    module = theirs()
    for change, message in [
        ({"n_heads": 3}, "n_heads is 3"),
        ({"positional_encoding": "none"}, "positional_encoding is 'none'"),
        ({"base": "geosparse"}, "base is"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(older_file(tmp_path / "old.pt", module, **change))
    state = module.state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc2.bias is missing, and should be \(16,\)"):
        torch.save({"config": {"n_heads": 2, "rope": True}, "state_dict": state}, tmp_path / "old.pt")
        convert(tmp_path / "old.pt")


def test_values_of_every_kind_come_back(tmp_path):
    dtypes = torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool
    content = {
        "numbers": [1, -1, 300, 70000, 1 << 40, 2.5, True, False, None], "bytes": b"\x00\xff", "tuple": (1, (2, 3, 4, 5)),
        7: {"x": []}, "tensors": {d: torch.arange(6).reshape(2, 3).to(d).t() for d in dtypes},
    }  # fmt: skip
    content["tensors"] = {str(d): t for d, t in content["tensors"].items()} | {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.ones(0, 3),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    with TorchFile(tmp_path / "x.pt") as file:
        assert {name: value for name, value in file.content.items() if name != "tensors"} == {
            n: v for n, v in content.items() if n != "tensors"
        }
        tensors = file.tensors(file.content["tensors"])
    assert all(torch.equal(tensors[name], t) and tensors[name].dtype == t.dtype for name, t in content["tensors"].items())
