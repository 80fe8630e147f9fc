"""psannLM as its users hold it: the quickstart, saving and loading, estimator manners, weights of psannlm."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import warnings

import psannlm
import pytest
import torch
from psann_fast import ModelConfig, TrainConfig, psannLM, psannLMDataPrep
from psann_fast.train import checkpoint
from psann_kernels import explain
from psannlm.lm.models.transformer_respsann import build_respsann_transformer
from psannlm.lm.models.transformer_waveresnet import build_waveresnet_transformer
from tiny import BASES, POSITIONS, SENTENCES, data, fitted, model, tokens


def test_the_quickstart_of_the_documentation(capsys, tmp_path):
    from psann_fast import psannLM, psannLMDataPrep

    texts = ["hello world", "goodnight moon"]
    dp = psannLMDataPrep(
        texts,
        tokenizer="auto",              # or "sentencepiece" / "tokenizers" / "simple"
        tokenizer_model_path=None,      # optional: load a prebuilt tokenizer model
        max_length=256,
        pack_sequences=True,
    )  # fmt: skip

    torch.manual_seed(0)  # an unlucky draw may end the document at once
    model = psannLM(base="waveresnet", d_model=512, n_layers=8, n_heads=8,
                    vocab_size=dp.vocab_size, rope=True,
                    sine_params=dict(amp_init=1.0, freq_init=1.0, damp_init=0.01, trainable=True))  # fmt: skip

    model.fit(dp, epochs=1, batch_tokens=65536, lr=2e-4, amp="bf16")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "generating up to")  # the window is two short texts
        print(model.generate("Once upon a time", top_p=0.9, max_new_tokens=64))

        # Mixed-length batch generation (length bucketing, no masks required)
        outs = model.generate_batch(["hello", "goodnight"], max_new_tokens=32, top_p=0.9)
    print(outs)

    written = capsys.readouterr().out
    assert written.endswith(f"{outs}\n") and len(written) > len(f"{outs}\n") + 1
    assert len(outs) == 2 and model.history_[-1]["loss"] > 0
    model.save(tmp_path / "model")
    loaded = psannLM.load(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "generating up to")
        for options in (dict(temperature=0), dict(seed=3)):
            assert loaded.generate("Once", max_new_tokens=8, **options) == model.generate("Once", max_new_tokens=8, **options)


# -- saving and loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_a_loaded_model_generates_and_scores_the_same(base, tmp_path):
    lm = fitted(model(base=base), epochs=20, max_steps=20, lr=0.01)
    lm.save(tmp_path)
    loaded = psannLM.load(tmp_path, device="cpu")
    for options in (dict(temperature=0), dict(seed=3), dict(seed=4, top_k=5, repetition_penalty=1.2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            texts = [m.generate_batch(["The sea", "", "She"], max_new_tokens=20, **options) for m in (lm, loaded)]
        assert texts[0] == texts[1] and ("seed" not in options or len(set(texts[0])) == 3)
    assert loaded.score(SENTENCES[:2]) == lm.score(SENTENCES[:2])
    assert loaded.tokenizer.encode(SENTENCES[0]) == lm.tokenizer.encode(SENTENCES[0])
    assert not loaded.module.training and loaded.history_ == []
    # And it can go on training.
    assert fitted(loaded, data(tokenizer=loaded.tokenizer), max_steps=1).history_[0]["loss"] < lm.history_[0]["loss"]


def test_loading_and_generating_do_not_import_torchs_compiler(tmp_path):
    # Initialising a layer without memory did: two seconds before the first token.
    fitted(model(sine_params=dict(freq_init_std=0.1)), max_steps=1).save(tmp_path)
    code = (
        "import sys; from psann_fast import psannLM\n"
        "psannLM.load(sys.argv[1], device='cpu').generate('The', max_new_tokens=2)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "tokenizers"])
def test_subword_tokenizers_are_saved_inside(tokenizer, tmp_path):
    prepared = data(tokenizer=tokenizer, tokenizer_vocab_size=300)
    fitted(model(vocab_size=400), prepared, max_steps=1).save(tmp_path)
    loaded = psannLM.load(tmp_path, device="cpu")
    assert loaded.tokenizer.name == tokenizer and loaded.tokenizer.encode(SENTENCES[1]) == prepared.tokenizer.encode(SENTENCES[1])
    # More rows than the tokenizer has ids: none of the others is ever drawn.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert isinstance(loaded.generate("The", max_new_tokens=30, temperature=50.0, top_p=None, seed=0), str)


def test_backend_and_device_are_not_saved(tmp_path):
    lm = model(backend="torch")
    lm.save(tmp_path)
    saved = json.loads(checkpoint.read(tmp_path)["config.json"].read_text())["model"]
    assert set(lm.get_params()) - set(saved) == {"backend", "device"}
    loaded = psannLM.load(tmp_path, device="cpu")
    assert loaded.config.backend == "auto" and psannLM.load(tmp_path, device="cpu", backend="torch").config.backend == "torch"
    with pytest.raises(ValueError, match="backend is 'cuda'; choose one of"):
        psannLM.load(tmp_path, backend="cuda")


# -- fit ------------------------------------------------------------------------------------------------------------------------


def test_fit_returns_self_and_takes_vocabulary_and_window_from_the_data():
    lm = psannLM(d_model=16, n_layers=1, n_heads=2, device="cpu")
    with pytest.raises(ValueError, match="vocab_size is None; pass vocab_size= to psannLM, or call fit"):
        lm.module
    prepared = data(max_length=12)
    assert fitted(lm, prepared) is lm
    assert lm.config.vocab_size == prepared.vocab_size and lm.config.max_length == 12 and lm.tokenizer is prepared.tokenizer
    assert [row["step"] for row in lm.history_] == [1, 2, 3, 4]


def test_fit_trains_the_module_that_the_caller_holds():
    lm = psannLM(d_model=16, n_layers=1, n_heads=2, vocab_size=258, device="cpu")
    module = lm.module
    before = module.lm_head.weight.detach().clone()
    fitted(lm)
    assert lm.module is module and not torch.equal(module.lm_head.weight, before)


def test_the_module_is_drawn_from_torchs_random_state():
    first, second, other = model(seed=1), model(seed=1), model(seed=2)
    weights = [m.module.lm_head.weight for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_fit_takes_a_train_config_alone():
    settings = TrainConfig(max_steps=2, batch_tokens=64, log_interval_steps=1, progress=False)
    assert len(model().fit(data(), train_config=settings).history_) == 2


def test_data_that_does_not_fit_the_model():
    with pytest.raises(ValueError, match="vocab_size is 100, but the data has 258 token ids; pass vocab_size=258 or more"):
        fitted(model(vocab_size=100))
    with pytest.raises(TypeError, match=r"fit: data is a list; pass psannLMDataPrep\(texts, ...\)"):
        model().fit(["text"])
    with pytest.raises(TypeError, match="fit: val_data is a list"):
        model().fit(data(), ["text"])
    other = psannLMDataPrep(["\u00fcber"], tokenizer="simple", max_length=8)
    with pytest.raises(ValueError, match="val_data has another tokenizer than data; pass psannLMDataPrep"):
        model(vocab_size=300).fit(data(), other)
    with pytest.raises(ValueError, match="trained with another tokenizer than this data has; .*make a new psannLM"):
        fitted(fitted(model(vocab_size=300)), other)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda lm, prepared, folder: lm.fit(prepared, amp="fp16", checkpoint_dir=folder), "amp is 'fp16'"),
        (lambda lm, prepared, folder: lm.fit(prepared, ddp="on", checkpoint_dir=folder), "ddp is 'on'"),
        (
            lambda lm, prepared, folder: lm.fit(
                prepared, data(tokenizer="tokenizers", tokenizer_vocab_size=300), checkpoint_dir=folder
            ),
            "val_data",
        ),
        (lambda lm, prepared, folder: lm.set_params(base="none").fit(prepared, checkpoint_dir=folder), "base is 'none'"),
    ],
)  # fmt: skip
def test_a_fit_that_is_refused_changes_nothing(wrong, message, tmp_path):
    lm = psannLM(d_model=16, n_layers=1, n_heads=2, device="cpu")
    lm.history_ = earlier = [{"step": 1}]
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=message):
        wrong(lm, data(), tmp_path / "run")
    assert lm.tokenizer is None and lm.config.vocab_size is None and lm.config.max_length is None and lm.history_ is earlier
    assert lm._module is None and not (tmp_path / "run").exists() and torch.equal(state, torch.random.get_rng_state())


def test_a_run_folder_that_cannot_be_made_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    lm = psannLM(d_model=16, n_layers=1, n_heads=2, device="cpu")
    with pytest.raises(FileExistsError):
        lm.fit(data(), checkpoint_dir=tmp_path / "file")
    assert lm.tokenizer is None and lm.config.vocab_size is None and lm._module is None


def test_the_log_says_how_much_is_trained_on_what(caplog):
    lm, prepared = model(), data()
    with caplog.at_level(logging.INFO, "psann_fast"):
        fitted(lm, prepared, max_steps=1)
    assert any(
        f"{lm.module.num_parameters():,} parameters" in r.message and f"{prepared.train_tokens} tokens" in r.message
        for r in caplog.records
    )


# -- estimator manners ----------------------------------------------------------------------------------------------------------


def test_get_params_makes_an_equal_model():
    lm = psannLM(
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        rope=False,
        sine_params=dict(freq_init=2.0, learnable=("damping",)),
        wave_dilations=[1, 5],
    )
    params = lm.get_params()
    assert psannLM(**params).config == lm.config and psannLM(**params).get_params() == params
    assert params["positional_encoding"] == "sinusoidal" and params["sine_freq_init"] == 2.0
    assert psannLM(config=ModelConfig(**params)).config == lm.config


def test_set_params_before_the_module_is_built():
    lm = psannLM(vocab_size=9)
    assert lm.set_params(d_model=32, n_heads=4, rope=False, sine_params=dict(freq_init=2.0), device="cpu") is lm
    assert (lm.config.d_mlp, lm.config.n_kv_heads, lm.config.positional_encoding, lm.config.sine_freq_init) == (
        128,
        4,
        "sinusoidal",
        2.0,
    )
    assert lm.module.embed.weight.shape == (9, 32)
    with pytest.raises(ValueError, match="n_heads is 5, which does not divide d_model 32"):
        lm.set_params(n_heads=5)
    assert lm.config.n_heads == 4


def test_set_params_once_the_module_is_built():
    lm = fitted()
    with pytest.raises(ValueError, match="set_params: d_model cannot change once the module is built; make a new psannLM"):
        lm.set_params(d_model=32)
    assert lm.config.d_model == 16
    module, before = lm.module, lm.module(tokens(1, 9))
    lm.set_params(max_length=99, d_model=16)
    assert lm.module is module and lm.config.max_length == 99
    state = torch.random.get_rng_state()
    lm.set_params(backend="torch")
    assert torch.equal(torch.random.get_rng_state(), state) and not lm.module.training
    torch.testing.assert_close(lm.module(tokens(1, 9)), before)
    assert {row["backend"] for row in explain(lm.module)} == {"torch"}


def test_score_is_the_mean_over_the_tokens_of_each_text_alone():
    lm = fitted(epochs=9, max_steps=8, lr=0.01)
    lm.set_params(max_length=64)
    texts = ["The sea is calm.", "A caf\u00e9 \U0001f600"]
    result = lm.score(texts)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor(lm.tokenizer.encode(text))
        with torch.no_grad():
            # The first token from the separator alone, as when a document begins; the others from the text.
            first = lm.module(torch.tensor([[lm.tokenizer.eos_id]]))[0]
            rest = lm.module(ids[None, :-1])[0]
        total -= torch.cat((first, rest)).log_softmax(-1).gather(1, ids[:, None]).sum().item()
        count += len(ids)
    size = sum(len(text.encode()) for text in texts)
    assert result["tokens"] == count and result["bytes"] == size
    assert result["nats_per_token"] == pytest.approx(total / count, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert lm.score(iter(texts)) == result


def test_score_falls_as_the_model_learns():
    lm = model()
    before = fitted(lm, max_steps=1).score(SENTENCES)["nats_per_token"]
    assert fitted(lm, epochs=30, max_steps=40, lr=0.02).score(SENTENCES)["nats_per_token"] < before - 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.score([]), "score: texts holds no text; pass at least one non-empty str"),
        (lambda m: m.score([""]), "score: texts holds no text"),
        (lambda m: m.score("text"), "score: texts is one str; pass a list of texts"),
        (lambda m: model().score(["text"]), "score: the model has no tokenizer yet"),
    ],
)
def test_wrong_calls_of_score(call, message):
    with pytest.raises(ValueError, match=message):
        call(fitted(max_steps=1))


# -- weights of psannlm 2.0.1 ---------------------------------------------------------------------------------------------------

SHAPE = dict(vocab_size=50, d_model=32, n_layers=2, n_heads=4, d_mlp=48)
SINES = {
    "as it is": {}, "relu": dict(decay_mode="relu"), "no damping": dict(decay_mode="none"),
    "clamped": dict(amp_bounds=(0.8, 1.1), freq_bounds=(None, 1.2), damp_bounds=(0.2, None)),
}  # fmt: skip


def moved(module):
    """Every weight drawn anew from one seed, away from its start, so that a scale or bias that was left out shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            start = parameter.mean() if parameter.dim() == 1 else 0.0
            parameter.copy_(start + 0.15 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def same_logits(theirs, ours: psannLM) -> None:
    ids = tokens(3, 40, vocab_size=50)
    with torch.no_grad():
        expected, got = theirs(ids), ours.module(ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [build_respsann_transformer, build_waveresnet_transformer])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_transformer_of_psannlm_gives_its_logits(build, positions):
    torch.manual_seed(0)
    theirs = moved(build(**SHAPE, positional_encoding=positions))
    ours = psannLM.from_psannlm(theirs, device="cpu")
    assert ours.config.base == "respsann" and ours.config.positional_encoding == positions
    same_logits(theirs, ours)
    # A copy: what trains here does not move theirs.
    ours.module.lm_head.weight.data.zero_()
    assert theirs.lm_head.weight.abs().max() > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sine", SINES)
def test_their_sines_come_along(sine):
    from psannlm.lm.models.sine import SineConfig

    theirs = moved(build_respsann_transformer(**SHAPE, sine=SineConfig(**SINES[sine])))
    ours = psannLM.from_psannlm(theirs, device="cpu")
    same_logits(theirs, ours)
    plain = psannLM.from_psannlm(moved(build_respsann_transformer(**SHAPE)), device="cpu")
    ids = tokens(3, 40, vocab_size=50)
    with torch.no_grad():
        assert torch.equal(plain.module(ids), ours.module(ids)) == (sine == "as it is")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_an_estimator_of_psannlm_gives_its_logits(base, positions):
    torch.manual_seed(0)
    theirs = psannlm.psannLM(base=base, d_model=32, n_layers=2, n_heads=4, d_mlp=48, vocab_size=50, positional_encoding=positions)
    with pytest.raises(ValueError, match="from_psannlm: .*no model yet"):
        psannLM.from_psannlm(theirs)
    moved(theirs._ensure_model(50))
    same_logits(theirs._model, psannLM.from_psannlm(theirs, device="cpu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: build_waveresnet_transformer(**SHAPE, wave_interleave=True), "later tokens"),
        (lambda: build_waveresnet_transformer(**SHAPE, wave_interleave=True, wave_replace=True), "later tokens"),
        (lambda: build_respsann_transformer(**SHAPE, mlp_activation="gelu"), "sine"),
        (lambda: build_respsann_transformer(**SHAPE, use_spectral_gate=True), "spectral"),
    ],
)
def test_variants_of_psannlm_without_a_counterpart_are_refused(build, words):
    with pytest.raises(ValueError, match=f"(?s)from_psannlm.*{words}"):
        psannLM.from_psannlm(build())


@pytest.mark.parametrize("thing", [5, torch.nn.Linear(2, 2)], ids=["number", "module"])
def test_what_is_no_model_of_psannlm_is_refused(thing):
    with pytest.raises(TypeError, match=f"from_psannlm.*{type(thing).__name__}"):
        psannLM.from_psannlm(thing)
