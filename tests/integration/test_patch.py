"""patch() on models that are not ours: psannlm's, a SIREN, Llamas. Same results, an exact report, and a way back."""

from __future__ import annotations

import copy

import pytest
import torch
from psann.activations import PhaseSineParam, SineParam
from psann_fast.integrations.patch import PatchError, patch
from psannlm.architectures import LMArchitectureConfig, LMConfig, LMTemporalConfig, build_lm_model
from torch import nn


class SineLayer(nn.Module):
    """The layer of SIREN's own notebook."""

    def __init__(self, in_features, out_features, omega_0=30):
        super().__init__()
        self.omega_0, self.linear = omega_0, nn.Linear(in_features, out_features)

    def forward(self, input):
        return torch.sin(self.omega_0 * self.linear(input))


class Sine(nn.Module):
    """SIREN's activation, as its users write it."""

    def __init__(self, w0=30.0):
        super().__init__()
        self.w0 = w0

    def forward(self, x):
        return torch.sin(self.w0 * x)


def psannlm_model(positions="rope", dropout=0.0, **architecture) -> nn.Module:
    torch.manual_seed(0)
    config = LMConfig(
        architecture=LMArchitectureConfig.wave(**architecture), d_model=16, n_layers=2, n_heads=2, d_mlp=24, vocab_size=40,
        positional_encoding=positions, dropout=dropout,
    )  # fmt: skip
    return build_lm_model(config).model


def siren() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), Sine(), nn.Linear(16, 16), Sine(1.5), nn.Linear(16, 3))


def siren_of_layers() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(SineLayer(2, 16), SineLayer(16, 16), nn.Linear(16, 3))
    for linear in (model[1].linear, model[2]):
        nn.init.uniform_(linear.weight, -((6 / 16) ** 0.5) / 30, (6 / 16) ** 0.5 / 30)  # as SIREN's authors do
    return model


def state_of(model: nn.Module) -> dict:
    """Everything that undo must give back: each module's own attributes, and the hooks and parameters by identity."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


IDS = torch.randint(0, 40, (2, 13), generator=torch.Generator().manual_seed(1))
MODELS = {
    "psannlm": (psannlm_model, IDS, {"SelfAttention": 2, "SineParam": 2, "RMSNorm": 5}),
    "psannlm, ALiBi": (lambda: psannlm_model("alibi"), IDS, {"SelfAttention": 2, "SineParam": 2, "RMSNorm": 5}),
    "psannlm, sinusoidal": (lambda: psannlm_model("sinusoidal"), IDS, {"SelfAttention": 2, "SineParam": 2, "RMSNorm": 5}),
    "psannlm with its wave branch": (
        lambda: psannlm_model(temporal=LMTemporalConfig(mode="interleave")),
        IDS,
        {"SelfAttention": 2, "SineParam": 4, "RMSNorm": 7},
    ),
    "siren": (siren, torch.linspace(-1, 1, 40).view(20, 2), {"Sine": 2}),
    "siren of layers": (siren_of_layers, torch.linspace(-1, 1, 40).view(20, 2), {"SineLayer": 2}),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


@EVERY_MODEL
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_results_report_and_undo(name, backend):
    make, x, counts = MODELS[name]
    model = make()
    expected, before, names = results(model, x), state_of(model), list(model.state_dict())
    report = patch(model, backend=backend)
    logits, *gradients = results(model, x)
    torch.testing.assert_close(logits, expected[0], rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(gradients, expected[1:], strict=True):
        assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-8
    assert list(model.state_dict()) == names
    found = {old: sum(row.old == old for row in report.replaced) for old in counts}
    assert found == counts and not report.kept
    assert all(row.backend == backend for row in report.rows) or backend == "auto"
    assert {row.name for row in report.rows} <= {name for name, _ in model.named_modules()}

    again = patch(model, backend=backend)
    assert not again.replaced and {row.reason for row in again.rows} == {"patched already"}
    report.undo()
    model.zero_grad(set_to_none=True)
    assert state_of(model).keys() == before.keys()
    for module, attributes in state_of(model).items():
        assert attributes.keys() == before[module].keys()
        assert all(
            attributes[key] is before[module][key] or attributes[key] == before[module][key]
            for key in attributes
            if key != "_parameters"
        )
    for value, wanted in zip(results(model, x), expected, strict=True):
        assert torch.equal(value, wanted)
    report.undo()


def test_our_kernels_run(monkeypatch):
    """The results above would be the same if nothing had been replaced."""
    from psann_fast.integrations import patch_attention, patch_pointwise

    model, called = psannlm_model(), []
    patched = patch(model)
    monkeypatch.setattr(patch_pointwise, "damped_sine", lambda z, *a, **o: called.append("sine") or z)
    monkeypatch.setattr(patch_pointwise, "rms_norm", lambda x, *a, **o: called.append("norm") or x)
    monkeypatch.setattr(patch_attention, "rope_attention", lambda q, *a, **o: called.append("attention") or q)
    model(IDS)
    assert called == ["norm", "attention", "norm", "sine"] * 2 + ["norm"]
    patched.undo()
    model(IDS)
    assert len(called) == 9


def test_psannlms_attention_with_its_cache():
    model = psannlm_model()
    expected = [t for t in (model(IDS, use_cache=True)[0], model(IDS))]
    report = patch(model, strict=True)
    assert {row.reason for row in report.rows if row.old == "SelfAttention"} == {"given a cache, it runs its own code"}
    cached, caches = model(IDS[:, :9], use_cache=True)
    rest, _ = model(IDS[:, 9:], use_cache=True, past_kvs=caches)
    torch.testing.assert_close(torch.cat((cached, rest), 1), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(IDS), expected[1], rtol=1e-5, atol=1e-5)


def test_attention_that_is_not_what_it_looks_like():
    dropping, changed = psannlm_model(dropout=0.1), psannlm_model()
    other = type("SelfAttention", (type(changed.blocks[1].attn),), {"forward": lambda self, x, **options: x})
    changed.blocks[1].attn.__class__ = other
    rows = {row.name: row for row in patch(changed).rows}
    assert rows["blocks.0.attn"].new == "rope_attention" and rows["blocks.1.attn"].new is None
    assert "does not compute causal attention" in rows["blocks.1.attn"].reason
    assert {row.reason for row in patch(dropping).kept} == {
        "it drops attention's probabilities (p = 0.1), and the kernels have no dropout"
    }


def test_only_this_instance_changes():
    model, other = psannlm_model(), psannlm_model()
    patch(model)
    assert all("forward" not in vars(module) for module in other.modules())
    assert (
        model.blocks[0].mlp.act.forward.__func__ is not SineParam.forward
        and other.blocks[0].mlp.act.forward.__func__ is SineParam.forward
    )
    twin = copy.deepcopy(other)
    assert torch.equal(twin(IDS), other(IDS))


def test_hooks_training_mode_and_dtype_stay():
    model = siren()
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    patch(model)
    model(torch.zeros(4, 2))
    assert seen == [(4, 16)] and model.training
    assert model.double()(torch.zeros(4, 2, dtype=torch.float64)).dtype == torch.float64


def test_a_patched_model_compiles():
    model, x = psannlm_model(), IDS
    expected = model(x)
    patch(model)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), expected, rtol=1e-4, atol=1e-5)


def test_dry_run_changes_nothing():
    model = psannlm_model()
    before = state_of(model)
    planned = patch(model, dry_run=True)
    assert len(planned.replaced) == 9 and state_of(model) == before
    assert patch(model).rows == planned.rows
    planned.undo()
    assert "forward" in vars(model.ln_f)


def test_what_stays_is_listed_with_its_reason():
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.full((4,), 2.0)), 1e-6

        def forward(self, x):  # Gemma's kind: 1 + weight
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    class sin(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    model = nn.ModuleDict(
        {"norm": OddRMSNorm(), "phase": PhaseSineParam(4), "sin": sin(), "other": nn.GELU(), "hand": SineParam(4)}
    )
    model["hand"].forward = lambda z: z
    rows = {row.name: row for row in patch(model).rows}
    assert rows.keys() == {"norm", "phase", "sin", "hand"} and all(row.new is None for row in rows.values())
    assert "does not compute x / sqrt" in rows["norm"].reason and "_phi" in rows["phase"].reason
    assert "its frequency is no number" in rows["sin"].reason and "replaced by someone else" in rows["hand"].reason
    assert "OddRMSNorm" in str(patch(model)) and "does not compute" in str(patch(model))
    before = state_of(model)
    with pytest.raises(PatchError, match=r"4 modules of a known kind cannot be replaced, so nothing was: norm \(OddRMSNorm\)"):
        patch(model, strict=True)
    assert state_of(model) == before


@pytest.mark.parametrize("options", [{}, {"decay_mode": "relu"}, {"bounds": {"decay": (0.2, 0.3)}}, {"feature_dim": 1}])
def test_every_option_of_psanns_sine(options):
    sine = SineParam(6, decay_init=0.25, **options)
    x = torch.linspace(-3, 3, 72).view(2, 6, 6)
    expected = sine(x)
    assert len(patch(sine, strict=True).replaced) == 1
    torch.testing.assert_close(sine(x), expected, rtol=1e-5, atol=1e-6)


def test_torchs_own_norm_and_half_precision():
    model = nn.Sequential(nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-5)).bfloat16()
    x = torch.randn(3, 8).bfloat16()
    expected = model(x)
    assert len(patch(model, strict=True).replaced) == 2
    torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="model is a int; pass an nn.Module"):
        patch(3)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        patch(nn.Linear(2, 2), backend="cuda")
    with pytest.raises(PatchError, match="native: .*|native does not implement"):
        patch(nn.Sequential(SineParam(4)).double(), backend="native", strict=True)


def test_a_llama_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    other = copy.deepcopy(model)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    expected, real = model(IDS, attention_mask=mask).logits, mask.bool()
    report = patch(model, strict=True)
    assert {row.old for row in report.replaced} == {"LlamaRMSNorm", "attention sdpa", "LlamaForCausalLM"}
    assert len(report.replaced) == 7
    assert model.config._attn_implementation == "psann_torch" and other.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits[real], expected[real], rtol=1e-5, atol=1e-5)
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(IDS, **options), other.generate(IDS, **options))
    report.undo()
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(IDS, attention_mask=mask).logits, expected)
    model.config.attention_dropout = 0.1
    with pytest.raises(PatchError, match="attention_dropout is 0.1"):
        patch(model, strict=True)


@pytest.mark.parametrize(
    "family, options, reason",
    [
        ("Gemma2ForCausalLM", dict(head_dim=8), "it caps scores (attn_logit_softcapping=50.0)"),
        ("GptOssForCausalLM", dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1), "its attention has sinks"),
        ("BertModel", {}, "not all of its attention is known to be causal"),
        ("T5Model", dict(num_layers=1, d_kv=8, d_ff=16, num_heads=2, d_model=16), "does not take another attention"),
    ],
)
def test_models_whose_attention_is_another(family, options, reason):
    """Replacing it would raise at the first batch."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    kind = getattr(transformers, family)
    row = patch(kind(kind.config_class(**sizes | options)), dry_run=True).rows[-1]
    assert row.new is None and row.old.startswith("attention") and reason in row.reason


FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Olmo", "Olmo2", "SmolLM3", "Starcoder2"]


def tiny_model(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    config = getattr(transformers, f"{family}Config")(**sizes, head_dim=8, pad_token_id=0)
    return getattr(transformers, f"{family}ForCausalLM")(config).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_transformers_models(family):
    """In float64, where a difference is a bug: loss and gradients, with what Trainer passes beside labels."""
    model = tiny_model(family)
    labels = IDS.clone()
    labels[0, :6] = -100
    cases = [{}, {"num_items_in_batch": torch.tensor(9)}, {"shift_labels": labels.roll(-1, 1)}, {"return_dict": False}]
    found = []
    for change in (None, lambda: patch(model)):
        if change is not None:
            report = change()
        found.append([])
        for options in cases:
            model.zero_grad()
            output = model(IDS, labels=labels, **options)
            output[0].double().backward()
            found[-1] += [output[0].detach().double(), *(parameter.grad.clone() for parameter in model.parameters())]
    row = next(row for row in report.rows if row.new == "linear_cross_entropy")
    assert row.name == "" and row.old == f"{family}ForCausalLM" and "logits are None" in row.reason
    for expected, value in zip(*found, strict=True):
        assert (value - expected).abs().max() <= 1e-6 * expected.abs().max()  # transformers takes the loss in float32
    assert model(IDS, labels=labels).logits is None and isinstance(model(IDS, labels=labels, return_dict=False)[0], torch.Tensor)
    assert model(IDS).logits.shape == (2, 13, 40) and model(IDS, labels=labels, logits_to_keep=13).logits is not None
    assert model.eval()(IDS, labels=labels).logits is not None
    report.undo()
    assert model.train()(IDS, labels=labels).logits is not None


def test_losses_that_are_others():
    capped, custom, quantized = tiny_model("Llama"), tiny_model("Llama"), tiny_model("Llama")
    custom.loss_function = lambda **inputs: inputs["logits"].sum()
    quantized.lm_head = nn.Sequential(quantized.lm_head)
    capped.__class__ = type("CappedForCausalLM", (type(capped),), {})
    for model, reason in (
        (capped, "not known to be"),
        (custom, "loss_function is another"),
        (quantized, "lm_head is a Sequential"),
    ):
        row = next(row for row in patch(model, dry_run=True).rows if row.old.endswith("ForCausalLM"))
        assert row.new is None and reason in row.reason
    model = tiny_model("Llama")
    patch(model)
    model.lm_head.register_forward_hook(lambda *_: None)
    assert model(IDS, labels=IDS).logits is not None


def test_a_model_within_another_and_one_that_shares_its_configuration():
    model = tiny_model("Llama").eval()
    other = type(model)(model.config).double().eval()
    whole = nn.ModuleDict({"teacher": model, "head": nn.Linear(2, 2)})
    expected = model(IDS).logits
    report = patch(whole)
    assert {row.name for row in report.replaced if row.new != "rms_norm"} == {"teacher"}
    assert model.config._attn_implementation == "psann_torch" and other.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-9, atol=1e-9)
    report.undo()
    assert model.config is other.config and model.model.layers[0].self_attn.config is other.config
