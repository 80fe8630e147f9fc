"""A model goes out to transformers, runs there without us, and comes back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from psann_fast import cli, psannLM, psannLMDataPrep
from psann_fast.data import train_tokenizer
from psann_fast.integrations.export import export, import_exported, to_transformers
from psann_fast.train.checkpoint import CheckpointError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXTS = [
    "The river runs past the mill; the mill grinds corn.\n" * 8,
    "Nobody minds 3.14 na\u00efve caf\u00e9s \u2014 or \U0001f642.\n" * 8,
]
UNSEEN = ["", " ", "a  b \t c\n\n", "<|psann_eos|> stays text", "\u4e2d\u6587 \u00ff\0", "[EOS]</s><s>", "mill" * 50]
POSITIONS = ["rope", "alibi", "sinusoidal"]
BASES = ["respsann", "waveresnet"]
TOKENIZERS = ["simple", "sentencepiece", "tokenizers"]
SINE = {"freq_init_std": 0.5, "damp_bounds": (0.005, None), "mode": "relu", "learnable": ("amplitude", "frequency")}


def tiny(base="waveresnet", positions="rope", tokenizer=None, **options) -> psannLM:
    torch.manual_seed(0)
    sizes = dict(d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_mlp=24, vocab_size=300, max_length=64)
    model = psannLM(base=base, positional_encoding=positions, device="cpu", **sizes | options)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if tokenizer is not None:
        model.tokenizer = train_tokenizer(tokenizer, TEXTS, None if tokenizer == "simple" else 290)
    return model


def trained(base: str, tokenizer: str) -> psannLM:
    """Trained until it writes text: a fresh model writes broken UTF-8."""
    torch.manual_seed(0)
    ours = psannLM(base=base, d_model=32, n_layers=2, n_heads=2, device="cpu")
    data = psannLMDataPrep(TEXTS, tokenizer=tokenizer, tokenizer_vocab_size=290, max_length=64)
    return ours.fit(data, max_steps=60, epochs=60, batch_tokens=512, lr=1e-2, progress=False)


def ids_of(model: psannLM, tokens: int = 13) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (3, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("base", BASES)
def test_logits_padding_packing_and_generation(base, positions):
    ours = tiny(base, positions, sine_params=SINE)
    ours.module.double()  # where a difference is a bug; the folder below runs in float32
    theirs, ids = to_transformers(ours), ids_of(ours)
    padding, packed = torch.ones_like(ids), torch.tensor([[*range(5), *range(6), 0, 1]] * 3)
    padding[0, :5] = 0
    expected, alone = ours.module(ids), ours.module(ids[:1, 5:])
    documents = ours.module(ids, packed == 0)
    text = ids[:1, 5:]
    for _ in range(7):
        text = torch.cat((text, ours.module(text)[:, -1:].argmax(-1)), 1)
    options = dict(max_new_tokens=7, do_sample=False, pad_token_id=0)
    for implementation in ("sdpa", "eager", "psann_torch"):
        theirs.set_attn_implementation(implementation)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(theirs(ids, attention_mask=padding).logits[:1, 5:], alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(theirs(ids, position_ids=packed, use_cache=False).logits, documents, rtol=1e-9, atol=1e-9)
        assert torch.equal(theirs.generate(text[:, :8], **options), text)
        batch = theirs.generate(ids, attention_mask=padding, **options)
        assert torch.equal(batch[:1, 5:], text)
        assert torch.equal(theirs.generate(ids, attention_mask=padding, use_cache=False, **options), batch)
    with_cache = theirs.generate(ids, attention_mask=padding, num_beams=3, **options)
    assert torch.equal(with_cache, theirs.generate(ids, attention_mask=padding, num_beams=3, use_cache=False, **options))


@pytest.mark.parametrize("base", BASES)
def test_gradients_and_the_loss(base):
    ours = tiny(base)
    ours.module.double()
    theirs, ids = to_transformers(ours).train(), ids_of(ours)
    loss = theirs(ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(ours.module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    # transformers computes the loss in float32, whatever the logits.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    found = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.module.named_parameters():
        difference = (found[name] - parameter.grad).abs().max()
        assert difference <= 1e-6 * parameter.grad.abs().max() + 1e-9, f"{name}: {difference}"


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("base", BASES)
def test_a_static_cache(base, positions):
    ours = tiny(base, positions)
    ours.module.double()
    theirs, ids = to_transformers(ours), ids_of(ours)
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    for mask in (torch.ones_like(ids), padding):
        expected = theirs.generate(ids, attention_mask=mask, use_cache=False, **options)
        for implementation in ("sdpa", "eager", "psann_torch"):
            theirs.set_attn_implementation(implementation)
            found = theirs.generate(ids, attention_mask=mask, cache_implementation="static", **options)
            assert torch.equal(found, expected), implementation


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("base", BASES)
def test_a_separator_stands_alone(base, positions):
    """As in training: otherwise a text that transformers' tools open with BOS would be judged worse than by score."""
    ours = tiny(base, positions, tokenizer="simple")
    ours.module.double()
    theirs, ids, separator = to_transformers(ours), ids_of(ours), ours.tokenizer.eos_id
    ids[0, 0] = ids[1, 4] = ids[2, 8] = ids[2, 9] = separator
    is_separator = ids == separator
    starts = is_separator | torch.nn.functional.pad(is_separator[:, :-1], (1, 0))
    expected, padding = ours.module(ids, starts), torch.ones_like(ids)
    padding[1, :3] = padding[2, :6] = 0
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    for implementation in ("sdpa", "eager", "psann_torch"):
        theirs.set_attn_implementation(implementation)
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-9, atol=1e-9)
        if implementation == "eager":
            continue  # it reads the same masks as sdpa
        for text, begins in zip(ids, (1, 5, 10)):
            alone = theirs.generate(text[None, begins:], use_cache=False, **options)
            assert torch.equal(theirs.generate(text[None], **options)[:, begins:], alone)
            assert torch.equal(theirs.generate(text[None], cache_implementation="static", **options)[:, begins:], alone)
        batch = theirs.generate(ids, attention_mask=padding, **options)
        assert torch.equal(batch, theirs.generate(ids, attention_mask=padding, use_cache=False, **options))
        assert torch.equal(batch[2:, 10:], alone)


@torch.no_grad()
def test_generation_from_embeddings_and_by_guessing_ahead():
    ours = tiny(tokenizer="simple")
    ours.module.double()
    theirs, ids = to_transformers(ours), ids_of(ours)[:1]
    options = dict(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = theirs.generate(ids, **options)
    assert torch.equal(theirs.generate(inputs_embeds=theirs.get_input_embeddings()(ids), **options), expected[:, 13:])
    repeated = torch.cat((ids, ids[:, :9]), 1)  # so that looking a continuation up finds some that are wrong
    assert torch.equal(theirs.generate(repeated, prompt_lookup_num_tokens=4, **options), theirs.generate(repeated, **options))
    first = theirs.generate(ids, return_dict_in_generate=True, **options | {"max_new_tokens": 4})
    rest = theirs.generate(first.sequences, past_key_values=first.past_key_values, **options | {"max_new_tokens": 5})
    assert torch.equal(rest, expected)


@pytest.mark.parametrize("base", BASES)
def test_what_transformers_records_and_checkpoints(base):
    theirs, ids = to_transformers(tiny(base)), ids_of(tiny(base))
    theirs.set_attn_implementation("eager")
    found = theirs(ids, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == 4 and found.hidden_states[0].shape == (3, 13, 16)
    assert torch.equal(theirs.lm_head(found.hidden_states[-1]), found.logits)
    assert [weights.shape for weights in found.attentions] == [(3, 4, 13, 13)] * 3
    gradients = []
    for change in (None, theirs.activation_checkpointing_enable):
        if change is not None:
            change()
        theirs.train().zero_grad()
        theirs(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in theirs.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients, strict=True))


def batched(model, prompts: list[list[int]], **options) -> list[list[int]]:
    batching = transformers.ContinuousBatchingConfig(block_size=8, num_blocks=16, max_batch_tokens=16)
    generation = transformers.GenerationConfig(**options)
    outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching, warmup=False)
    return sorted(output.generated_tokens for output in outputs.values())


def test_continuous_batching():
    ours = tiny("respsann")
    theirs, ids = to_transformers(ours), ids_of(ours)
    prompts = [ids[0].tolist(), ids[1, :4].tolist()]
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1)
    alone = [theirs.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    assert batched(theirs, prompts, **options) == sorted(alone)


@torch.no_grad()
@pytest.mark.parametrize("base, positions", [("waveresnet", "rope"), ("respsann", "alibi")])
def test_what_continuous_batching_cannot_serve(base, positions):
    """Its tokens would be wrong without a word: those of one text would be the near past of another's."""
    theirs, ids = to_transformers(tiny(base, positions)), ids_of(tiny())
    with pytest.raises(ValueError, match="continuous batching keeps keys and values alone"):
        theirs(ids[:1], cache=object(), use_cache=False)


# -- the folder -------------------------------------------------------------------------------------------------------------------

# What a machine without psann-fast does: its packages cannot be found, installed or not.
STRANGER = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("psann_fast", "psann_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(ids).logits
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
text = write("The river", max_new_tokens=8, do_sample=False)[0]["generated_text"]
assert not [name for name in sys.modules if name.startswith("psann")], "psann-fast was there"
model.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(ids).logits, logits)
torch.save({"logits": logits, "text": text}, folder + "/answer.pt")
"""


@pytest.mark.parametrize("base, tokenizer", [("waveresnet", "sentencepiece"), ("respsann", "simple")])
def test_the_folder_runs_where_psann_fast_is_not_installed(base, tokenizer, tmp_path):
    ours = trained(base, tokenizer)
    folder = tmp_path / "exported"
    assert export(ours, folder) == []
    ids = ids_of(ours)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), json.dumps(ids.tolist())], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    answer = torch.load(folder / "answer.pt", weights_only=True)
    torch.testing.assert_close(answer["logits"], ours.module(ids).detach(), rtol=1e-5, atol=1e-5)
    text = "The river" + ours.generate("The river", max_new_tokens=8, temperature=0)
    assert answer["text"] == text and "\ufffd" not in text and len(text) > len("The river")


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_fast_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    ours = tiny(tokenizer=tokenizer)
    assert export(ours, tmp_path) == []
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS + UNSEEN:
        ids = ours.tokenizer.encode(text)
        assert fast(text, add_special_tokens=False).input_ids == ids, text
        assert fast.decode(ids) == ours.tokenizer.decode(ids), text
    assert (fast.pad_token_id, fast.eos_token_id) == (ours.tokenizer.pad_id, ours.tokenizer.eos_id)
    assert fast.padding_side == "left" and fast.model_max_length == 64
    # Ids that spell no UTF-8. SentencePiece's counterpart knows another rule for those, so there only whole texts count.
    generator = torch.Generator().manual_seed(0)
    for _ in range(200 if tokenizer != "sentencepiece" else 0):
        ids = torch.randint(ours.tokenizer.vocab_size, (12,), generator=generator).tolist()
        assert fast.decode(ids, skip_special_tokens=True) == ours.tokenizer.decode(ids), ids


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("tokenizer", [None, *TOKENIZERS])
def test_there_and_back(base, tokenizer, tmp_path, recwarn):
    ours = tiny(
        base, tokenizer=tokenizer, sine_params=SINE, tie_embeddings=base == "respsann", max_length=64 if tokenizer else None
    )
    notes = export(ours, tmp_path)
    back = import_exported(tmp_path, device="cpu")
    assert back.config == ours.config
    ids = ids_of(ours)
    assert torch.equal(back.module(ids), ours.module(ids))
    if tokenizer is None:
        assert notes == ["the model has no tokenizer, so none is exported"] and back.tokenizer is None
        assert any("set model.tokenizer" in str(w.message) for w in recwarn)
    else:
        assert notes == [] and back.tokenizer.to_files() == ours.tokenizer.to_files()


def test_the_command_line_exports_and_imports(tmp_path, capsys):
    ours = tiny(tokenizer="simple")
    ours.save(tmp_path / "ours")
    assert cli.main(["export", str(tmp_path / "ours"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    assert cli.main(["export", str(tmp_path / "ours"), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0  # over itself
    assert cli.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "back")]) == 0
    assert "with its simple tokenizer" in capsys.readouterr().out
    for arguments, message in [
        (
            ["export", str(tmp_path / "ours"), "--to", "hf", "--out", str(tmp_path / "back")],
            "holds something else; pass a new folder",
        ),
        (["import", str(tmp_path / "hf"), "--out", str(tmp_path / "hf")], "which is what is imported"),
        (["import", str(tmp_path / "ours"), "--out", str(tmp_path / "x")], "psannLM.load"),
        (["export", str(tmp_path / "nothing"), "--to", "hf", "--out", str(tmp_path / "x")], "is not a folder"),
    ]:
        assert cli.main(arguments) == 2 and message in capsys.readouterr().err
    back, ids = psannLM.load(tmp_path / "back", device="cpu"), ids_of(ours)
    assert torch.equal(back.module(ids), ours.module(ids))
    assert back.generate("The", max_new_tokens=5, temperature=0) == ours.generate("The", max_new_tokens=5, temperature=0)


def test_the_model_card_runs_and_names_the_model(tmp_path, monkeypatch, capsys):
    for tokenizer in ("simple", None):
        folder = tmp_path / str(tokenizer)
        export(tiny(tokenizer=tokenizer), folder)
        card = (folder / "README.md").read_text()
        assert "`waveresnet`: 3 layers, d_model 16" in card and "does not know how the model was trained" in card
        monkeypatch.chdir(folder)
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
        assert capsys.readouterr().out.strip()


def test_a_model_of_another_base_is_refused(tmp_path):
    from psann_fast import register_base
    from psann_fast.models import registry, respsann

    register_base("exported-elsewhere", respsann.build)
    try:
        with pytest.raises(ValueError, match="base is 'exported-elsewhere'; the exported code knows"):
            export(tiny("exported-elsewhere"), tmp_path)
    finally:
        del registry._BASES["exported-elsewhere"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "model_type is 'llama'"),
        (lambda folder: changed(folder, num_hidden_layers=2_000_000), "num_hidden_layers is 2000000, but the weights hold"),
        (lambda folder: changed(folder, hidden_size=32), "missing, unknown, or of another shape"),
        (lambda folder: changed(folder, base="other"), "base is 'other'|does not hold a usable model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "does not hold a usable model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            "names files outside",
        ),
    ],
)
def test_damaged_folders(damage, message, tmp_path):
    export(tiny(), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        import_exported(tmp_path)


def changed(folder: Path, **options) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


# -- lm-eval ----------------------------------------------------------------------------------------------------------------------


def test_lm_evals_rolling_loglikelihood_is_our_score(tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'psann-fast[eval]'")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ours = trained("waveresnet", "simple")
    export(ours, tmp_path / "hf")
    texts = ["The river runs past the mill.", "Nobody minds caf\u00e9s.", "x", TEXTS[0][:320]]
    # The last takes five whole windows. Where the last window is a part of one, lm-eval gives it more context than score does.
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "task": "rolling", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}},
        "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rolling.yaml").write_text(json.dumps(task))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, device="cpu"), tasks=["rolling"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )  # fmt: skip
    found = results["results"]["rolling"]["bits_per_byte,none"]
    scores = [ours.score([text]) for text in texts]  # together they would be packed, and cut elsewhere
    bits, size = (sum(values) for values in zip(*((score["bits_per_byte"] * score["bytes"], score["bytes"]) for score in scores)))
    assert found == pytest.approx(bits / size, rel=1e-5)
