"""What a user does wrong is said in one sentence that also says what to do: the table."""

from __future__ import annotations

import re
from typing import Callable

import psann_kernels
import pytest
import torch
from psann_fast import psannLM, psannLMDataPrep
from psann_fast.cli import USER_ERRORS
from psann_fast.data import load_tokenizer
from psann_fast.train.checkpoint import CheckpointError
from psann_fast.train.guard import TrainingDiverged
from psann_kernels import BackendError, triton_support
from tiny import data, fitted, model, tiny, tokens

Case = tuple[Callable[..., object], type[Exception], str]


def broken_model(tmp_path):
    fitted(model(), max_steps=1).save(tmp_path)
    path = next(tmp_path.glob("model-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return psannLM.load(tmp_path, device="cpu")


def written(tmp_path, content: bytes, name: str = "text.txt"):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def without_interpreter(monkeypatch, call):
    monkeypatch.setattr(triton_support, "IS_INTERPRETED", False)
    return call()


def without_gpu(monkeypatch, call):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return call()


def diverging():
    lm = model()
    lm.module.register_forward_hook(lambda _, args, out: out * float("nan"))
    return fitted(lm)


QKV = torch.zeros(1, 4, 2, 6)

# What is done, the error, and the part of its message that says what to do.
TABLE: dict[str, Case] = {
    # the corpus
    "no texts": (lambda: psannLMDataPrep([]), ValueError, "texts is empty; pass at least one text"),
    "empty texts": (lambda: psannLMDataPrep(["", ""]), ValueError, "all 2 texts are empty strings; pass at least one character"),
    "one string": (lambda: psannLMDataPrep("text"), ValueError, "pass a list of texts, [text], or paths=[...] to read files"),
    "no source": (lambda: psannLMDataPrep(), ValueError, "pass texts=[...] or paths=[...]"),
    "bytes": (
        lambda: psannLMDataPrep([b"text"]),
        ValueError,
        "texts[0] is a bytes; every text must be a str; decode it, or pass paths=",
    ),
    "a surrogate": (lambda: psannLMDataPrep(["\ud800"]), ValueError, "decode its bytes as UTF-8"),
    "an empty file": (lambda tmp_path: psannLMDataPrep(paths=written(tmp_path, b"")), ValueError, "is empty; take it out"),
    "a file that is not UTF-8": (
        lambda tmp_path: psannLMDataPrep(paths=written(tmp_path, b"\xff")),
        ValueError,
        "convert the file",
    ),
    "a missing file": (lambda tmp_path: psannLMDataPrep(paths=tmp_path / "none.txt"), FileNotFoundError, "none.txt does not exist"),
    "a folder without texts": (lambda tmp_path: psannLMDataPrep(paths=tmp_path), ValueError, "holds no .txt file"),
    "a split of too little": (lambda: psannLMDataPrep(["a"], val_split=0.5), ValueError, "pass more text or val_split=0"),
    "a missing tokenizer": (lambda tmp_path: load_tokenizer(tmp_path / "none.model"), FileNotFoundError, "there is no such file"),
    "a tokenizer that is none": (
        lambda tmp_path: load_tokenizer(written(tmp_path, b"{}", "bad.json")),
        ValueError,
        "not a tokenizer of the `tokenizers` library",
    ),
    "a vocabulary below the bytes": (
        lambda: data(tokenizer="tokenizers", tokenizer_vocab_size=9),
        ValueError,
        "needs at least 258 ids",
    ),
    # options
    "an unknown model option": (lambda: psannLM(d_modl=8), TypeError, "did you mean 'd_model'?"),
    "an unknown data option": (lambda: psannLMDataPrep(["a"], max_lenght=8), TypeError, "did you mean 'max_length'?"),
    "an unknown fit option": (lambda: model().fit(data(), epoch=2), TypeError, "did you mean 'epochs'?"),
    "an unknown generate option": (
        lambda: fitted(max_steps=1).generate("a", temprature=1),
        TypeError,
        "did you mean 'temperature'?",
    ),
    "an unknown base": (lambda: psannLM(base="gpt", vocab_size=9).module, ValueError, "choose one of 'respsann', 'waveresnet'"),
    "an unknown backend": (lambda: psannLM(backend="cuda"), ValueError, "must be one of 'auto', 'triton', 'native', 'torch'"),
    "a number of the wrong type": (lambda: psannLM(d_model=8.5), ValueError, "must be a whole number of at least 1"),
    "odd head_dim with rotary positions": (
        lambda: psannLM(d_model=30, n_heads=2),
        ValueError,
        "choose an even head_dim, or positional_encoding 'alibi'",
    ),
    "heads that do not divide": (lambda: psannLM(d_model=30, n_heads=4), ValueError, "choose a divisor"),
    "no vocabulary": (lambda: psannLM().module, ValueError, "pass vocab_size= to psannLM, or call fit"),
    # shapes and dtypes
    "ids of one dimension": (lambda: tiny()(tokens(9)), ValueError, "must be (batch, tokens) of torch.int64"),
    "ids that are floats": (lambda: tiny()(tokens(1, 9).float()), ValueError, "must be (batch, tokens) of torch.int64"),
    "document_starts of another shape": (
        lambda: tiny()(tokens(1, 9), torch.ones(1, 8, dtype=torch.bool)),
        ValueError,
        "must be bool of input_ids' shape (1, 9)",
    ),
    "document_starts that are numbers": (
        lambda: tiny()(tokens(1, 9), tokens(1, 9)),
        ValueError,
        "must be bool of input_ids' shape (1, 9)",
    ),
    "a sine of other features": (
        lambda: psann_kernels.damped_sine(torch.ones(2, 3), *[torch.ones(4)] * 3),
        ValueError,
        "pass one amplitude per feature, shape (3,)",
    ),
    "attention of mixed dtypes": (lambda: psann_kernels.rope_attention(QKV, QKV.double(), QKV), ValueError, "make them alike"),
    "a data set that is a list": (lambda: model().fit(["text"]), TypeError, "pass psannLMDataPrep(texts, ...)"),
    "data of another vocabulary": (lambda: fitted(model(vocab_size=9)), ValueError, "pass vocab_size=258 or more to psannLM"),
    # devices and precision
    "fp16 on a CPU": (lambda: fitted(amp="fp16"), ValueError, "use amp='bf16', or 'fp32'"),
    "triton without a GPU": (
        lambda monkeypatch: without_interpreter(monkeypatch, lambda: tiny(backend="triton")(tokens(1, 9))),
        BackendError,
        "TRITON_INTERPRET=1",
    ),
    "a GPU that is not there": (
        lambda monkeypatch: without_gpu(monkeypatch, lambda: model(device="cuda")),
        ValueError,
        "use device='cpu' or 'auto'",
    ),
    "a device that is none": (lambda: model(device="gpu"), ValueError, "it must be 'auto', 'cpu', 'cuda'"),
    "ddp without a launcher": (lambda: fitted(ddp="on"), ValueError, "use ddp='auto' or 'off'"),
    "a run that diverges": (diverging, TrainingDiverged, "Lower lr (it is 0.005), lengthen warmup_steps, or use amp='fp32'"),
    # generation
    "a negative temperature": (
        lambda: fitted(max_steps=1).generate("a", temperature=-0.5),
        ValueError,
        "temperature is -0.5; it must be a number at least 0",
    ),
    "top_p of 0": (
        lambda: fitted(max_steps=1).generate("a", top_p=0),
        ValueError,
        "top_p is 0; it must be a number above 0 and at most 1",
    ),
    "no tokens": (lambda: fitted(max_steps=1).generate("a", max_new_tokens=0), ValueError, "must be a whole number of at least 1"),
    "generating before fit": (
        lambda: model().generate("a"),
        ValueError,
        "call fit first, load a saved model, or set model.tokenizer",
    ),
    "a prompt that is no text": (lambda: fitted(max_steps=1).generate(b"a"), ValueError, "prompt 0 is a bytes; it must be a str"),
    "prompts that are one text": (
        lambda: fitted(max_steps=1).generate_batch("a"),
        ValueError,
        "pass a list of prompts, or call generate",
    ),
    # model folders
    "a corrupt model folder": (broken_model, CheckpointError, "it is damaged: load another checkpoint"),
    "no model folder": (lambda tmp_path: psannLM.load(tmp_path / "none"), CheckpointError, "pass the folder that save() wrote"),
    "a folder of others": (lambda tmp_path: psannLM.load(tmp_path), CheckpointError, "pass the folder that save() wrote"),
}


@pytest.mark.parametrize("name", TABLE)
def test_an_error_says_what_to_do(name, request):
    call, kind, what_to_do = TABLE[name]
    wanted = call.__code__.co_varnames[: call.__code__.co_argcount]
    with pytest.raises(kind) as caught:
        call(**{argument: request.getfixturevalue(argument) for argument in wanted})
    message = str(caught.value)
    assert type(caught.value) is kind and issubclass(kind, USER_ERRORS), "the command line would show a traceback"
    assert what_to_do in message
    assert "\n" not in message and 20 < len(message) < 400
    # One sentence; a diverging run may add its advice.
    assert len(re.findall(r"[a-z)]\. [A-Z]", message)) <= (1 if kind is TrainingDiverged else 0)


def test_what_the_issue_names_is_in_the_table():
    named = (
        "no texts",
        "an unknown model option",
        "ids of one dimension",
        "ids that are floats",
        "odd head_dim with rotary positions",
        "fp16 on a CPU",
        "a negative temperature",
        "a corrupt model folder",
        "a missing file",
        "triton without a GPU",
        "ddp without a launcher",
    )
    assert not set(named) - set(TABLE)
