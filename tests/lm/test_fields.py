"""Every configuration field does something: one function for each field shows its effect, and none may be missing."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import sys
import threading
import warnings

import pytest
import torch
from psann_fast import DataConfig, ModelConfig, TrainConfig, psannLM
from psann_fast.data import train_tokenizer
from psann_fast.train import checkpoint, run_folder
from psann_fast.train.checkpoints import Checkpoints
from psann_fast.train.distributed import check_launch
from psann_fast.train.loss import LossModule
from psann_fast.train.optim import build_optimizers, default_optimizer, default_rate
from psann_kernels import explain
from tiny import SENTENCES, data, fitted, model, tiny, tokens

SHOWN: dict[type, dict[str, object]] = {ModelConfig: {}, DataConfig: {}, TrainConfig: {}}


def shows(kind: type, *names: str):
    """Decorator: this function shows the effect of a field; of several, called with each name."""

    def note(function):
        for name in names:
            assert name not in SHOWN[kind], f"{name} is shown twice"
            SHOWN[kind][name] = function
        return function

    return note


# -- ModelConfig ----------------------------------------------------------------------------------------------------------------


def logits(module) -> torch.Tensor:
    with torch.no_grad():
        return module(tokens(2, 12))


def with_weights_of(other, **options) -> torch.Tensor:
    """Logits of a model with these options and the other one's weights: what the option alone changes."""
    module = tiny(**options)
    module.load_state_dict(other.state_dict())
    return logits(module)


@shows(ModelConfig, "base")
def base():
    names = set(tiny(base="waveresnet").state_dict()) - set(tiny(base="respsann").state_dict())
    assert names and all(".wave." in name for name in names)


@shows(ModelConfig, "d_model")
def d_model():
    assert tiny(d_model=24).embed.weight.shape == (29, 24) and tiny(d_model=24).hidden(tokens(1, 3)).shape == (1, 3, 24)


@shows(ModelConfig, "n_layers")
def n_layers():
    assert len(tiny(n_layers=3).blocks) == 3 and not any(name.startswith("blocks.1") for name in tiny(n_layers=1).state_dict())


@shows(ModelConfig, "n_heads")
def n_heads():
    module = tiny(n_heads=2)
    assert not torch.allclose(logits(module), with_weights_of(module, n_heads=4), atol=1e-3)


@shows(ModelConfig, "n_kv_heads")
def n_kv_heads():
    assert tiny(n_kv_heads=1).blocks[0].attn.k_proj.weight.shape == (8, 16) and tiny().blocks[0].attn.k_proj.weight.shape == (
        16,
        16,
    )


@shows(ModelConfig, "d_mlp")
def d_mlp():
    assert tiny(d_mlp=40).blocks[0].mlp.fc1.weight.shape == (40, 16) and tiny(d_mlp=None).blocks[0].mlp.fc1.weight.shape == (64, 16)


@shows(ModelConfig, "vocab_size")
def vocab_size():
    assert tiny(vocab_size=31)(tokens(1, 2)).shape == (1, 2, 31)


@shows(ModelConfig, "positional_encoding")
def positional_encoding():
    module = tiny(base="respsann")
    seen = [with_weights_of(module, base="respsann", positional_encoding=name) for name in ("rope", "alibi", "sinusoidal")]
    for one, other in itertools.combinations(seen, 2):
        assert not torch.allclose(one[:, 1:], other[:, 1:], atol=1e-3)
    # At position 0 nothing is turned and nothing is far away.
    torch.testing.assert_close(seen[0][:, 0], seen[1][:, 0], rtol=0, atol=1e-5)


@shows(ModelConfig, "rope_theta")
def rope_theta():
    module = tiny(base="respsann")
    other = with_weights_of(module, base="respsann", rope_theta=100.0)
    torch.testing.assert_close(logits(module)[:, 0], other[:, 0], rtol=0, atol=1e-5)
    assert (logits(module)[:, 1:] - other[:, 1:]).abs().max() > 1e-3


@shows(ModelConfig, "dropout")
def dropout():
    for p, is_random in ((0.0, False), (0.5, True)):
        module = tiny(dropout=p).train()
        assert torch.equal(logits(module), logits(module)) != is_random


@shows(ModelConfig, "tie_embeddings")
def tie_embeddings():
    module, apart = tiny(tie_embeddings=True), tiny()
    assert module.lm_head.weight is module.embed.weight and apart.lm_head.weight is not apart.embed.weight


@shows(ModelConfig, "max_length")
def max_length():
    lm = fitted(model(max_length=40), max_steps=1)
    assert lm.config.max_length == 40 and fitted(max_steps=1).config.max_length == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.generate("x" * 20, max_new_tokens=20)
    with pytest.warns(UserWarning, match="windows of 40"):
        lm.generate("x" * 20, max_new_tokens=30)


SINE = ("amplitude", "frequency", "damping")
SHORT = dict(zip(("amp", "freq", "damp"), SINE))


def sines(**options) -> dict[str, torch.Tensor]:
    """Each sine parameter over the features of the MLP and of the wave branch, fresh."""
    torch.manual_seed(0)
    lm = psannLM(base="waveresnet", d_model=64, n_layers=1, n_heads=2, d_mlp=512, vocab_size=5, device="cpu", **options)
    block = lm.module.blocks[0]
    pairs = zip(block.mlp.act.parameters_of_sine(), block.wave.act.parameters_of_sine())
    return {name: torch.cat(pair).detach() for name, pair in zip(SINE, pairs)}


@shows(ModelConfig, *(f"sine_{name}_init" for name in SHORT))
def sine_init(field):
    name = SHORT[field.split("_")[1]]
    changed, default = sines(**{field: 0.7}), sines()
    torch.testing.assert_close(changed[name], torch.full_like(changed[name], 0.7))
    for other in SINE:
        assert torch.equal(changed[other], default[other]) == (other != name)


@shows(ModelConfig, *(f"sine_{name}_init_std" for name in SHORT))
def sine_init_std(field):
    name = SHORT[field.split("_")[1]]
    changed = sines(**{field.removesuffix("_std"): 4.0, field: 0.5})
    assert 0.4 < changed[name].std() < 0.6 and 3.9 < changed[name].mean() < 4.1
    assert all(changed[other].std() < 1e-6 for other in SINE if other != name)


@shows(ModelConfig, *(f"sine_{name}_bounds" for name in SHORT))
def sine_bounds(field):
    short = field.split("_")[1]
    free = sines(**{f"sine_{short}_init": 4.0, f"sine_{short}_init_std": 0.5})[SHORT[short]]
    held = sines(**{f"sine_{short}_init": 4.0, f"sine_{short}_init_std": 0.5, field: (3.8, 4.3)})[SHORT[short]]
    assert free.min() < 3.5 and free.max() > 4.5
    torch.testing.assert_close(held, free.clamp(3.8, 4.3))


def learning(**options) -> set[str]:
    names = {"_A": "amplitude", "_f": "frequency", "_d": "damping"}
    return {
        names[name.rpartition(".")[2]] for name, p in tiny(**options).named_parameters() if name[-2:] in names and p.requires_grad
    }


@shows(ModelConfig, "sine_trainable")
def sine_trainable():
    assert learning() == set(SINE) and learning(sine_trainable=False) == set()


@shows(ModelConfig, "sine_learnable")
def sine_learnable():
    assert learning(sine_learnable=("damping", "frequency")) == {"damping", "frequency"}


@shows(ModelConfig, "sine_mode")
def sine_mode():
    module = tiny(sine_damp_init=0.5)
    seen = [with_weights_of(module, sine_mode=mode) for mode in ("abs", "relu", "none")]
    assert all(not torch.allclose(one, other, atol=1e-3) for one, other in itertools.combinations(seen, 2))


@shows(ModelConfig, "wave_kernel")
def wave_kernel():
    assert tiny(base="waveresnet", wave_kernel=7).blocks[0].wave.weight.shape == (16, 7)


@shows(ModelConfig, "wave_dilations")
def wave_dilations():
    module = tiny(base="waveresnet", n_layers=3, wave_kernel=2, wave_dilations=(5, 2))
    assert [block.wave.dilation for block in module.blocks] == [5, 2, 5]
    other = with_weights_of(module, base="waveresnet", n_layers=3, wave_kernel=2, wave_dilations=(1,))
    assert not torch.allclose(logits(module), other, atol=1e-3)


@shows(ModelConfig, "backend")
def backend():
    for name in ("torch", "triton"):
        serving = {row["op"]: row["backend"] for row in explain(tiny(backend=name))}
        assert serving["damped_sine_mlp"] == name
    torch.testing.assert_close(logits(tiny(backend="torch")), logits(tiny(backend="auto")), rtol=0, atol=1e-4)


@shows(ModelConfig, "device")
def device():
    assert psannLM(vocab_size=5, d_model=8, n_heads=2, device="meta").module.embed.weight.device.type == "meta"
    assert psannLM(vocab_size=5, d_model=8, n_heads=2, device="cpu").module.embed.weight.device.type == "cpu"


# -- DataConfig -----------------------------------------------------------------------------------------------------------------


@shows(DataConfig, "tokenizer")
def tokenizer():
    for name in ("simple", "sentencepiece", "tokenizers"):
        assert data(tokenizer=name, tokenizer_vocab_size=300).tokenizer_backend == name
    assert data(tokenizer="auto", tokenizer_vocab_size=300).tokenizer_backend == "sentencepiece"


@shows(DataConfig, "tokenizer_model_path")
def tokenizer_model_path(tmp_path):
    train_tokenizer("simple", ["\u00e9\u00fc"]).save(tmp_path)
    assert data(tokenizer="auto", tokenizer_model_path=tmp_path).vocab_size == 260 != data().vocab_size


@shows(DataConfig, "tokenizer_vocab_size")
def tokenizer_vocab_size():
    small, large = (data(tokenizer="tokenizers", tokenizer_vocab_size=size) for size in (265, 280))
    assert small.vocab_size == 265 and large.vocab_size == 280 and small.train_tokens > large.train_tokens


@shows(DataConfig, "max_length")
def data_max_length():
    assert data(max_length=16).dataset[0]["input_ids"].shape == (16,) and data(max_length=5).dataset[0]["input_ids"].shape == (5,)


@shows(DataConfig, "pack_sequences")
def pack_sequences():
    packed, apart = data(max_length=80), data(max_length=80, pack_sequences=False)
    assert len(apart) == len(SENTENCES) > len(packed)
    assert all((example["input_ids"] == apart.eos_id).sum() == 1 for example in apart.dataset)


@shows(DataConfig, "val_split")
def val_split():
    assert data().val_dataset is None
    small, large = data(val_split=0.2), data(val_split=0.6)
    assert 0 < small.val_tokens < large.val_tokens and small.train_tokens > large.train_tokens


@shows(DataConfig, "seed")
def data_seed():
    chosen = {tuple(data(val_split=0.4, seed=seed).val_texts) for seed in range(6)}
    assert len(chosen) > 1 and data(val_split=0.4, seed=3).val_texts == data(val_split=0.4, seed=3).val_texts
    # The order of the examples too: the first step of training has another loss, with the same weights.
    firsts = [fitted(model(), data(seed=seed), max_steps=1, batch_tokens=32).history_[0]["loss"] for seed in (1, 1, 2)]
    assert firsts[0] == firsts[1] != firsts[2]


# -- TrainConfig ----------------------------------------------------------------------------------------------------------------


def history(**options) -> list[dict]:
    return fitted(**options).history_


def weights(**options) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in fitted(**options).module.parameters()])


@shows(TrainConfig, "epochs")
def epochs():
    for count in (1, 3):
        rows = history(epochs=count, max_steps=None)
        assert rows[-1]["epoch"] == count and rows[-1]["tokens"] == count * data().train_tokens


@shows(TrainConfig, "max_steps")
def max_steps():
    assert [row["step"] for row in history(max_steps=3)] == [1, 2, 3]


@shows(TrainConfig, "batch_tokens")
def batch_tokens():
    assert history(batch_tokens=32, max_steps=1)[0]["tokens"] == 32 and history(batch_tokens=64, max_steps=1)[0]["tokens"] == 64


@shows(TrainConfig, "grad_accum_steps")
def grad_accum_steps():
    assert history(grad_accum_steps=3, max_steps=1)[0]["tokens"] == 3 * 64


@shows(TrainConfig, "lr")
def lr():
    assert max(row["lr"] for row in history(lr=0.005)) == 0.005
    assert not torch.equal(weights(lr=0.005), weights(lr=0.001))
    assert max(row["lr"] for row in history(optimizer="adamw")) == default_rate(16, "adamw") == 3e-3
    assert max(row["lr"] for row in history(optimizer="muon")) == default_rate(16, "muon") == 5e-3
    assert default_rate(512, "adamw") == pytest.approx(1.5e-3) and default_rate(512, "muon") == pytest.approx(2.5e-3)


@shows(TrainConfig, "min_lr_ratio")
def min_lr_ratio():
    last = [history(lr=0.01, max_steps=4, warmup_steps=0, min_lr_ratio=ratio)[-1]["lr"] for ratio in (0.0, 0.5, 1.0)]
    assert last == pytest.approx([0.01 * 0.25, 0.01 * (0.5 + 0.5 * 0.25), 0.01])


@shows(TrainConfig, "warmup_steps")
def warmup_steps():
    options = dict(epochs=9, max_steps=30, lr=0.03)
    assert history(warmup_steps=0, **options)[0]["lr"] == 0.03 and history(warmup_steps=3, **options)[0]["lr"] == pytest.approx(
        0.01
    )


@shows(TrainConfig, "weight_decay")
def weight_decay():
    sizes = []
    for decay in (0.0, 1.0):
        module = fitted(weight_decay=decay, lr=0.05).module
        sizes.append(module.lm_head.weight.norm())
    assert sizes[1] < 0.99 * sizes[0]


@shows(TrainConfig, "beta1", "beta2")
def betas(field):
    # The first step of Adam is the same for all; the later ones differ.
    one, three = ([weights(max_steps=steps, epochs=2, min_lr_ratio=1.0, **beta) for beta in ({}, {field: 0.3})] for steps in (1, 3))
    torch.testing.assert_close(one[0], one[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(three[0], three[1], rtol=1e-4, atol=1e-5)
    betas = build_optimizers(tiny(), TrainConfig(lr=0.01, **{field: 0.3}))[0].param_groups[0]["betas"]
    assert betas == {"beta1": (0.3, 0.99), "beta2": (0.9, 0.3)}[field]


@shows(TrainConfig, "label_smoothing")
def label_smoothing():
    # A confident model pays for its confidence.
    lm = fitted(epochs=30, max_steps=40, lr=0.02)
    plain, smoothed = (fitted(lm, max_steps=1, lr=1e-9, label_smoothing=value).history_[0]["loss"] for value in (0.0, 0.3))
    assert smoothed > plain + 0.3


@shows(TrainConfig, "grad_clip")
def grad_clip():
    # Adam's first step hardly depends on the gradient's size, but the balance of several steps does.
    assert history(grad_clip=0.01)[0]["grad_norm"] > 0.1
    assert not torch.allclose(weights(grad_clip=0.01), weights(grad_clip=0), rtol=1e-4, atol=1e-5)


@shows(TrainConfig, "amp")
def amp():
    for name, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        lm, seen = model(), set()
        lm.module.blocks[0].mlp.fc1.register_forward_hook(lambda _, args, out, seen=seen: seen.add(out.dtype))
        fitted(lm, max_steps=1, amp=name)
        assert seen == {expected}


@shows(TrainConfig, "ddp")
def ddp():
    assert torch.equal(weights(ddp="auto"), weights(ddp="off"))
    with pytest.raises(ValueError, match="ddp is 'on', but this process was not started as one of several"):
        fitted(ddp="on")


@shows(TrainConfig, "fsdp")
def fsdp():
    # With processes: test_distributed.
    with pytest.raises(ValueError, match="fsdp is True, but this process was not started as one of several"):
        fitted(fsdp=True)
    with pytest.raises(ValueError, match="amp='bf16'"):
        check_launch(TrainConfig(fsdp=True, amp="fp16"))


@shows(TrainConfig, "compile")
def compiled(monkeypatch):
    asked = []
    monkeypatch.setattr(LossModule, "compile", lambda self: asked.append(1))
    for wanted in (False, True):
        fitted(max_steps=1, compile=wanted)
        assert len(asked) == wanted


@shows(TrainConfig, "cuda_graphs")
def cuda_graphs():
    # With a recording in the place of a graph: test_train_graphs.
    with pytest.raises(ValueError, match="cuda_graphs is True, and the model is on cpu, .*; leave cuda_graphs out"):
        fitted(cuda_graphs=True)


@shows(TrainConfig, "activation_checkpointing")
def activation_checkpointing():
    runs, computed = [], []
    for wanted in (False, True):
        lm, calls = model(dropout=0.2), []
        lm.module.blocks[0].mlp.fc1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        fitted(lm, activation_checkpointing=wanted)
        runs.append(torch.cat([p.detach().flatten() for p in lm.module.parameters()]))
        computed.append(len(calls))
        assert "forward" not in vars(lm.module.blocks[0])
    assert computed == [4, 8] and torch.equal(*runs)


@shows(TrainConfig, "optimizer")
def optimizer():
    names = {
        name: [type(o).__name__ for o in build_optimizers(tiny(), TrainConfig(lr=0.01, optimizer=name))]
        for name in ("adamw", "muon")
    }
    assert names == {"adamw": ["AdamW"], "muon": ["AdamW", "Muon"]}
    assert not torch.allclose(weights(optimizer="muon"), weights(optimizer="adamw"), atol=1e-4)
    assert torch.equal(weights(optimizer="muon"), weights())
    assert [default_optimizer(amp) for amp in ("auto", "bf16", "fp16", "fp32")] == ["muon", "muon", "adamw", "muon"]


@shows(TrainConfig, "keep_checkpoints")
def keep_checkpoints(tmp_path):
    for keep in (1, 3):
        folder = tmp_path / str(keep)
        fitted(max_steps=4, save_interval_steps=1, keep_checkpoints=keep, checkpoint_dir=folder)
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [f"step-0000000{n}" for n in range(5 - keep, 5)]


@shows(TrainConfig, "async_checkpoints")
def async_checkpoints(tmp_path, monkeypatch):
    threads, real = [], checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: threads.append(threading.current_thread()) or real(*args))
    for wanted in (False, True):
        fitted(max_steps=2, async_checkpoints=wanted, checkpoint_dir=tmp_path / str(wanted))
        assert all((thread is threading.main_thread()) != wanted for thread in threads) and threads
        threads.clear()
    one, other = (psannLM.load(tmp_path / str(wanted), device="cpu").module.state_dict() for wanted in (False, True))
    assert all(torch.equal(one[name], other[name]) for name in one)


@shows(TrainConfig, "resume")
def resume(tmp_path):
    whole = weights(max_steps=4)
    with pytest.raises(KeyboardInterrupt):
        fitted(interrupted(model(), 3), checkpoint_dir=tmp_path, save_interval_steps=1)
    lm = fitted(checkpoint_dir=tmp_path, resume="auto")
    assert [row["step"] for row in lm.history_] == [3, 4]
    assert torch.equal(whole, torch.cat([p.detach().flatten() for p in lm.module.parameters()]))


def interrupted(lm, step):
    calls = []

    def end(*_):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt

    lm.module.register_forward_hook(end)
    return lm


@shows(TrainConfig, "sample_interval_steps", "sample_prompt")
def samples(field, tmp_path):
    plain = weights(max_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = fitted(sample_interval_steps=2, sample_prompt="She", checkpoint_dir=tmp_path)
    written = (tmp_path / "samples.txt").read_text()
    assert written.startswith("--- step 2\nShe") and written.count("--- step ") == 2
    assert torch.equal(plain, torch.cat([p.detach().flatten() for p in lm.module.parameters()])), "a sample moved the run"


@shows(TrainConfig, "tensorboard")
def tensorboard(tmp_path, monkeypatch):
    written = []

    class Board:
        def __init__(self, folder, purge_step=None):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, *args):
            written.append(args)

        def close(self):
            written.append("closed")

    monkeypatch.setattr(run_folder, "tensorboard_writer", lambda: Board)
    fitted(max_steps=1, checkpoint_dir=tmp_path, tensorboard=True)
    assert {"loss", "tokens_per_second", "mfu"} <= {entry[0] for entry in written[:-1]} and written[-1] == "closed"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        fitted(max_steps=1, checkpoint_dir=tmp_path / "other", tensorboard=True)
    assert not (tmp_path / "other").exists()


@shows(TrainConfig, "seed")
def train_seed():
    # Dropout of a model that is there, and the first weights of one that is not; not the order of the examples.
    dropped = [fitted(model(dropout=0.3), max_steps=1, seed=seed).history_[0]["loss"] for seed in (1, 1, 2)]
    assert dropped[0] == dropped[1] != dropped[2]
    assert torch.equal(weights(seed=1), weights(seed=2))
    fresh = [
        fitted(psannLM(base="respsann", d_model=16, n_layers=1, n_heads=2, device="cpu"), max_steps=1, seed=seed).history_[0]
        for seed in (1, 1, 2)
    ]
    assert fresh[0]["loss"] == fresh[1]["loss"] != fresh[2]["loss"]


@shows(TrainConfig, "nan_policy")
def nan_policy():
    for policy, steps in (("stop", 1), ("skip", 4)):
        lm, calls = model(), []
        lm.module.register_forward_hook(
            lambda _, args, out, calls=calls: out * (calls.append(1) or (1 if len(calls) != 2 else float("nan")))
        )
        if policy == "stop":
            with pytest.raises(FloatingPointError):
                fitted(lm)
        else:
            fitted(lm, nan_policy="skip")
        assert len(lm.history_) == steps


@shows(TrainConfig, "checkpoint_dir")
def checkpoint_dir(tmp_path):
    lm = fitted(checkpoint_dir=tmp_path / "run")
    assert psannLM.load(tmp_path / "run", device="cpu").module.lm_head.weight.equal(lm.module.lm_head.weight)


@shows(TrainConfig, "log_interval_steps")
def log_interval_steps():
    assert [row["step"] for row in history(epochs=9, max_steps=8, log_interval_steps=3)] == [1, 4, 7, 8]


@shows(TrainConfig, "save_interval_steps")
def save_interval_steps(tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, name, snapshot: saves.append((name, snapshot.step)))
    fitted(epochs=9, max_steps=8, save_interval_steps=3, checkpoint_dir=tmp_path)
    assert saves == [("last", 3), ("last", 6), ("last", 8)]


@shows(TrainConfig, "eval_interval_steps")
def eval_interval_steps():
    rows = fitted(prepared=data(val_split=0.3), epochs=9, max_steps=8, eval_interval_steps=3).history_
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [3, 6, 8]


@shows(TrainConfig, "progress")
def progress(capsys):
    fitted(progress=False)
    assert capsys.readouterr().err == ""
    fitted(progress=True)
    assert "loss=" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------------------------


def test_no_field_is_missing():
    for kind, shown in SHOWN.items():
        assert set(shown) == {f.name for f in dataclasses.fields(kind)}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in SHOWN for name in SHOWN[kind]])
def test_effect(kind, name, request):
    function = SHOWN[kind][name]
    wanted = inspect.signature(function).parameters
    function(**{argument: name if argument == "field" else request.getfixturevalue(argument) for argument in wanted})


def test_the_alias_fields_have_their_effect():
    assert psannLM(rope=False).config.positional_encoding == "sinusoidal"
    assert psannLM(sine_params=dict(freq_init=1.0)).config.sine_freq_init == 1.0
