"""Our attention, activation and model inside the installed transformers, against its own sdpa."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from psann_kernels.triton_support import IS_INTERPRETED
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from psann_fast.integrations.attention_transformers import interval_mask, intervals  # noqa: E402
from psann_fast.integrations.huggingface import SharedDampedSine, continuous_batching_attention  # noqa: E402

SIZES = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128,
)  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Mistral": dict(sliding_window=5),
    "Qwen2": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),  # one layer of each kind
}
IMPLEMENTATIONS = ["psann_torch", "psann_triton"]
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
IDS = torch.randint(3, 50, (3, 11), generator=torch.Generator().manual_seed(1))
ONES = torch.ones_like(IDS)
LEFT, RIGHT = ONES.clone(), ONES.clone()
LEFT[0, :4] = LEFT[1, :1] = RIGHT[0, 8:] = RIGHT[2, 5:] = 0
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9], list(range(11))])


def cases(*names: str) -> pytest.MarkDecorator:
    """(family, implementation, case). The interpreter is slow, so there Triton gets few; all of them passed once there too."""
    kept = {("Llama", "dynamic"), ("Qwen2", "static"), ("Llama", "plain"), ("Qwen2", "left padding"), ("Mistral", "packed")}
    every = [(family, implementation, name) for family in FAMILIES for implementation in IMPLEMENTATIONS for name in names]
    some = [case for case in every if case[1] == "psann_torch" or not IS_INTERPRETED or (case[0], case[2]) in kept]
    return pytest.mark.parametrize("family, implementation, case", some)


def tiny(family: str, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | options)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def logits_of(model: nn.Module, implementation: str, **inputs) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    return model(IDS, **inputs).logits


INPUTS = {
    "plain": {},
    "left padding": {"attention_mask": LEFT},
    "right padding": {"attention_mask": RIGHT},
    "packed": {"position_ids": PACKED, "use_cache": False},
    "no cache": {"use_cache": False},
}


@cases(*INPUTS)
def test_logits_and_gradients_are_sdpas(family, implementation, case):
    inputs = INPUTS[case]
    real = inputs.get("attention_mask", ONES).bool()
    found = {}
    for name in ("sdpa", implementation):
        model = tiny(family)
        logits = logits_of(model, name, **inputs)
        logits[real].square().mean().backward()
        found[name] = [logits.detach()[real], *(p.grad for p in model.parameters())]
    for expected, value in zip(found["sdpa"], found[implementation]):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_mask_matters():
    """Without a mask function padding would be ignored: then the test above would show nothing."""
    model = tiny("Llama")
    assert (logits_of(model, "psann_torch", attention_mask=LEFT) - logits_of(model, "psann_torch"))[0, 4:].abs().max() > 1e-3
    assert (
        logits_of(model, "sdpa", position_ids=PACKED, use_cache=False) - logits_of(model, "sdpa", use_cache=False)
    ).abs().max() > 1e-3


@cases("dynamic", "static", "beams")
def test_generate_is_token_identical(family, implementation, case):
    tokens = 2 if implementation == "psann_triton" and IS_INTERPRETED else 12
    options = {"dynamic": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}[case]
    model = tiny(family)
    texts = {}
    for name in ("sdpa", implementation):
        model.set_attn_implementation(name)
        texts[name] = model.generate(IDS, attention_mask=LEFT, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(texts["sdpa"], texts[implementation])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
@EVERY_FAMILY
def test_a_prompt_in_chunks_through_a_cache(family, cache):
    model = tiny(family)
    expected = logits_of(model, "sdpa", attention_mask=LEFT, use_cache=False)
    model.set_attn_implementation("psann_torch")
    options = {"max_cache_len": 16} if cache == "StaticCache" else {}
    past, found = getattr(transformers, cache)(config=model.config, **options), []
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    for begin, end in ((0, 5), (5, 10), (10, 11)):
        found.append(
            model(
                IDS[:, begin:end], attention_mask=LEFT[:, :end], past_key_values=past, position_ids=positions[:, begin:end]
            ).logits
        )
    torch.testing.assert_close(torch.cat(found, 1)[LEFT.bool()], expected[LEFT.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_continuous_batching_is_token_identical(implementation):
    model = tiny("Llama")
    model.set_attn_implementation("sdpa")
    prompts = [IDS[0].tolist(), IDS[1, :3].tolist(), IDS[2, :7].tolist()]
    tokens = 3 if implementation == "psann_triton" and IS_INTERPRETED else 8
    options = dict(max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=-1)
    generation = transformers.GenerationConfig(**options)
    # By default its cache takes most of the machine's memory.
    batching = transformers.ContinuousBatchingConfig(block_size=8, num_blocks=16, max_batch_tokens=16)
    alone = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]

    def batched():
        outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching, warmup=False)
        return sorted(tuple(output.generated_tokens) for output in outputs.values())

    file = sys.modules[type(model).__module__]
    original = file.ALL_ATTENTION_FUNCTIONS
    with continuous_batching_attention(model, implementation):
        assert file.ALL_ATTENTION_FUNCTIONS is not original
        assert batched() == sorted(map(tuple, alone))
    assert file.ALL_ATTENTION_FUNCTIONS is original


def test_continuous_batching_runs_ours(monkeypatch):
    """Another attention in the table gives other tokens: the test above would otherwise compare sdpa with itself."""
    from psann_fast.integrations import attention_transformers

    def refuse(*args, **kwargs):
        raise RuntimeError("our attention was called")

    model = tiny("Llama")
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(attention_transformers, "attention_function", lambda backend: refuse)
    with continuous_batching_attention(model, "psann_torch"), pytest.raises(RuntimeError, match="our attention was called"):
        model(IDS)


@pytest.mark.parametrize(
    "options, message", [(("sdpa",), "implementation is 'sdpa'"), (("psann_torch",), "no ALL_ATTENTION_FUNCTIONS")]
)
def test_continuous_batching_of_other_models(options, message):
    with pytest.raises(ValueError, match=message), continuous_batching_attention(nn.Linear(2, 2), *options):
        pass


# -- what is refused ------------------------------------------------------------------------------------------------------------


def test_a_mask_with_a_hole_is_refused():
    holes = ONES.clone()
    holes[0, 3] = 0
    with pytest.raises(ValueError, match="keys that are no interval"):
        logits_of(tiny("Llama"), "psann_torch", attention_mask=holes)


def test_a_mask_made_by_hand():
    model = tiny("Llama")
    seen = torch.ones(11, 11, dtype=torch.bool).tril()
    seen[5:, :3] = False  # tokens from 5 on forget the first three
    with torch.no_grad():
        by_hand = {"attention_mask": seen.expand(3, 1, 11, 11)}
        torch.testing.assert_close(
            logits_of(model, "psann_torch", **by_hand), logits_of(model, "sdpa", **by_hand), rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match="a gradient is wanted through a cache or a mask made by hand"):
        logits_of(model, "psann_torch", **by_hand)
    both_ways = torch.ones(3, 1, 11, 11, dtype=torch.bool)
    both_ways[:, :, 4, 2] = False
    with torch.no_grad(), pytest.raises(ValueError, match="keys that are no interval"):
        logits_of(model, "psann_torch", attention_mask=both_ways)


def test_dropout_and_other_options_are_refused():
    model = tiny("Llama", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="attention_dropout is 0.1, and the kernels have none"):
        logits_of(model, "psann_torch")
    attend = transformers.AttentionInterface()["psann_torch"]
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="this model needs softcap"):
        attend(model, q, q, q, None, softcap=30.0)
    with pytest.raises(ValueError, match="this layer is not causal"):
        attend(model, q, q, q, None, is_causal=False)
    with pytest.raises(ValueError, match="output_attentions=True needs the weights"):
        attend(model, q, q, q, None, output_attentions=True)


def test_intervals_of_masks():
    left = torch.tensor([[[[0, 0, 0], [0, 1, 0], [0, 1, 1]]]], dtype=torch.bool)
    assert intervals(left)[0, 0].tolist() == [[0, 0], [1, 1], [1, 2]]
    additive = torch.zeros(1, 1, 3, 3).masked_fill(~left, torch.finfo(torch.float32).min)
    assert torch.equal(intervals(additive), intervals(left))
    assert interval_mask(1, 3, 3) is None
    with pytest.raises(ValueError, match="one for each head"):
        intervals(left.expand(1, 2, 3, 3))


# -- activation and registration --------------------------------------------------------------------------------------------------


def test_the_activation_by_name():
    model = tiny("Llama", hidden_act="psann_sine")
    sine = model.model.layers[0].mlp.act_fn
    assert isinstance(sine, SharedDampedSine) and {"_A", "_f", "_d"} <= set(dict(sine.named_parameters()))
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.shape == (1,) for p in sine.parameters())
    z = torch.linspace(-3, 3, 10).view(2, 5)
    torch.testing.assert_close(sine(z), torch.exp(-0.01 * z.abs()) * torch.sin(3 * z), rtol=1e-5, atol=1e-6)


def test_nothing_is_registered_by_importing_psann_fast():
    code = (
        "import sys, psann_fast, psann_fast.cli, psann_kernels\n"
        "assert 'transformers' not in sys.modules, 'psann_fast imports transformers'\n"
        "import transformers\n"
        "assert 'psann_torch' not in transformers.AttentionInterface().valid_keys()\n"
        "import psann_fast.integrations.huggingface\n"
        "assert 'psann_torch' in transformers.AttentionInterface().valid_keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
