"""The two bases: causal to the bit, packed windows, names and shapes of the weights, what the options do."""

from __future__ import annotations

import math
import random

import pytest
import torch
from psann_fast import register_base
from psann_fast.models import LanguageModel, build_model, registry
from psann_fast.models.language_model import document_offsets, sinusoidal, window_positions
from psann_fast.models.layers import ENOUGH_TOKENS, alibi_slopes
from psann_fast.models.respsann import ResPSANNBlock
from tiny import BASES, POSITIONS, VOCABULARY, tiny, tiny_config, tokens
from torch import nn

EVERY_MODEL = pytest.mark.parametrize("base, positions", [(base, positions) for base in BASES for positions in POSITIONS])


def starts_at(shape: tuple[int, int], *places: tuple[int, int]) -> torch.Tensor:
    """document_starts with True at the given (row, token) places, and at token 0 of every row."""
    starts = torch.zeros(shape, dtype=torch.bool)
    starts[:, 0] = True
    for place in places:
        starts[place] = True
    return starts


class BidirectionalBlock(ResPSANNBlock):
    """A block that looks one token ahead: what the causality checks must find."""

    def forward(self, x, where, layer):
        x = super().forward(x, where, layer)
        return x + 0.1 * torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), 1)


# -- causality ------------------------------------------------------------------------------------------------------------------


def check_causality(module: nn.Module, draw: random.Random, length: int = 37, changes: int = 3) -> None:
    """Changed later tokens move no earlier logit by a bit, with and without documents."""
    ids = tokens(2, length, seed=draw.randrange(1 << 30))
    starts = starts_at((2, length), (0, draw.randrange(1, length)), (1, draw.randrange(1, length)))
    with torch.no_grad():
        for given in (None, starts):
            before = module(ids, given)
            for _ in range(changes):
                place = draw.randrange(1, length)
                changed = ids.clone()
                changed[:, place:] = (ids[:, place:] + draw.randrange(1, VOCABULARY)) % VOCABULARY
                after = module(changed, given)
                assert torch.equal(before[:, :place], after[:, :place]), f"a token at or after {place} moved an earlier logit"
                assert not torch.equal(before[:, place], after[:, place]), f"the token at {place} did not move its own logits"


@EVERY_MODEL
def test_a_later_token_moves_no_earlier_logit_by_a_bit(base, positions):
    check_causality(tiny(base=base, positional_encoding=positions), random.Random(0))


def test_the_causality_check_finds_a_model_that_looks_ahead():
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match="moved an earlier logit"):
        check_causality(LanguageModel(tiny_config(), BidirectionalBlock).eval(), random.Random(0))


@pytest.mark.campaign(weight=1)
def test_causality_of_random_models(campaign):
    for seed in campaign:
        draw = random.Random(seed)
        heads = draw.choice((1, 2, 4))
        options = dict(
            base=draw.choice(BASES),
            positional_encoding=draw.choice(POSITIONS),
            n_heads=heads,
            d_model=heads * 2 * draw.randint(1, 8),
            n_kv_heads=draw.choice([n for n in (1, 2, 4) if heads % n == 0]),
            n_layers=draw.randint(1, 3),
            d_mlp=draw.randint(1, 40),
            wave_kernel=draw.randint(1, 5),
            wave_dilations=tuple(draw.randint(1, 9) for _ in range(draw.randint(1, 3))),
            sine_mode=draw.choice(("abs", "relu", "none")),
            tie_embeddings=draw.random() < 0.5,
        )
        check_causality(tiny(draw.randrange(1 << 30), **options), draw, draw.randrange(2, 70), changes=2)


# -- documents in a window ------------------------------------------------------------------------------------------------------


def test_a_model_learns_after_it_ran_in_inference_mode():
    model = build_model(tiny_config(base="respsann", vocab_size=VOCABULARY))
    with torch.inference_mode():
        model(tokens(1, 5))
    cos, sin = model.rotary_tables(5)
    assert not cos.is_inference() and not sin.is_inference()
    model(tokens(1, 5)).sum().backward()


@EVERY_MODEL
def test_a_packed_window_equals_its_documents_alone(base, positions):
    module = tiny(base=base, positional_encoding=positions)
    ids = tokens(2, 33)
    # Documents of one token, shorter than the wave branch remembers, and longer, in places that differ between the rows.
    places = [[0, 1, 2, 5, 17], [0, 20, 32]]
    starts = starts_at((2, 33), *((row, start) for row, begins in enumerate(places) for start in begins))
    with torch.no_grad():
        packed = module(ids, starts)
        whole = module(ids)
        for row, begins in enumerate(places):
            for begin, end in zip(begins, [*begins[1:], 33]):
                alone = module(ids[row : row + 1, begin:end])[0]
                torch.testing.assert_close(packed[row, begin:end], alone, rtol=0, atol=1e-5)
    assert (packed[0, 2:] - whole[0, 2:]).abs().max() > 1e-2, "the documents did not matter, so equality shows nothing"


@EVERY_MODEL
def test_a_token_reaches_no_other_document(base, positions):
    module = tiny(base=base, positional_encoding=positions)
    ids = tokens(2, 20)
    starts = starts_at((2, 20), (0, 7), (0, 12), (1, 3))
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % VOCABULARY
    with torch.no_grad():
        moved = (module(ids, starts) != module(changed, starts)).any(-1)
    expected = torch.zeros(2, 20, dtype=torch.bool)
    expected[0, 8:12] = True
    assert torch.equal(moved, expected)


def test_the_first_token_of_a_row_always_begins_a_document():
    module, ids = tiny(), tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(module(ids, torch.zeros(2, 9, dtype=torch.bool)), module(ids, starts_at((2, 9))))


def test_document_offsets_and_positions():
    starts = starts_at((2, 4), (0, 2))
    # Three documents, then documents of no tokens up to a fixed size.
    assert document_offsets(starts).tolist() == [0, 2, 4, 8, 8, 8, 8, 8, 8]
    assert document_offsets(starts).dtype == torch.int32
    assert window_positions(tokens(2, 4), starts).tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert window_positions(tokens(2, 4), None).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    "starts, message",
    [
        (
            torch.zeros(2, 8, dtype=torch.bool),
            r"document_starts has shape \(2, 8\).*\(2, 9\), True at the first token of each document",
        ),
        (torch.zeros(9, dtype=torch.bool), r"document_starts has shape \(9,\)"),
        (torch.zeros(2, 9, dtype=torch.int64), "document_starts has .* dtype torch.int64; it must be bool"),
    ],
)
def test_document_starts_of_another_shape_or_dtype(starts, message):
    with pytest.raises(ValueError, match=message):
        tiny()(tokens(2, 9), starts)


@pytest.mark.parametrize("ids", [tokens(9), tokens(1, 2, 9), tokens(2, 9).int(), tokens(2, 9).float()], ids=str)
def test_input_ids_of_another_shape_or_dtype(ids):
    with pytest.raises(ValueError, match=r"input_ids has shape .* and dtype .*; it must be \(batch, tokens\) of torch.int64"):
        tiny()(ids)


# -- weights --------------------------------------------------------------------------------------------------------------------


def shapes_of(base: str, d_model: int, d_mlp: int, kv_width: int, layers: int, wave_kernel: int) -> dict[str, tuple[int, ...]]:
    """The state dict: psannlm 2.0.1's names, and the wave branch's beside them."""
    shapes = {"embed.weight": (VOCABULARY, d_model), "ln_f.scale": (d_model,), "lm_head.weight": (VOCABULARY, d_model)}
    for i in range(layers):
        block = {
            "attn.q_proj.weight": (d_model, d_model),
            "attn.k_proj.weight": (kv_width, d_model),
            "attn.v_proj.weight": (kv_width, d_model),
            "attn.o_proj.weight": (d_model, d_model),
            "mlp.fc1.weight": (d_mlp, d_model),
            "mlp.fc1.bias": (d_mlp,),
            "mlp.fc2.weight": (d_model, d_mlp),
            "mlp.fc2.bias": (d_model,),
            "norm1.scale": (d_model,),
            "norm2.scale": (d_model,),
            "mlp.act._A": (d_mlp,),
            "mlp.act._f": (d_mlp,),
            "mlp.act._d": (d_mlp,),
            "alpha": (1,),
        }
        if base == "waveresnet":
            block |= {
                "wave.norm.scale": (d_model,),
                "wave.weight": (d_model, wave_kernel),
                "wave.bias": (d_model,),
                "wave.act._A": (d_model,),
                "wave.act._f": (d_model,),
                "wave.act._d": (d_model,),
                "wave.out_proj.weight": (d_model, d_model),
            }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


@EVERY_MODEL
def test_names_and_shapes_of_the_state_dict(base, positions):
    module = tiny(base=base, positional_encoding=positions, n_kv_heads=1, wave_kernel=3)
    expected = shapes_of(base, 16, 24, 8, 2, 3)
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == expected
    assert module.num_parameters() == sum(map(math.prod, expected.values()))
    assert all(t.dtype == torch.float32 for t in module.state_dict().values())


@EVERY_MODEL
def test_every_parameter_learns(base, positions):
    module = tiny(base=base, positional_encoding=positions)
    ids = tokens(2, 20)
    nn.functional.cross_entropy(module(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    still = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, f"no gradient reaches {still}"


@pytest.mark.parametrize("base", BASES)
def test_a_fresh_model_knows_nothing_and_is_not_saturated(base):
    torch.manual_seed(0)
    module = build_model(tiny_config(base=base, d_model=64, n_layers=4, n_heads=4, d_mlp=256))
    ids = tokens(8, 65)
    loss = nn.functional.cross_entropy(module(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(VOCABULARY)) < 1.5
    assert module.blocks[0].alpha.tolist() == [1.0] and module.ln_f.scale.unique().tolist() == [1.0]
    assert 0.018 < module.embed.weight.std() < 0.022
    bound = math.sqrt(6 / (64 + 256))  # Xavier
    assert 0.9 * bound < module.blocks[0].mlp.fc1.weight.abs().max() <= bound


def test_tied_embeddings_are_one_matrix():
    module = tiny(tie_embeddings=True)
    assert module.lm_head.weight is module.embed.weight
    assert module.num_parameters() == tiny().num_parameters() - VOCABULARY * 16
    with torch.no_grad():
        hidden = module.hidden(tokens(1, 5))
        torch.testing.assert_close(module(tokens(1, 5)), hidden @ module.embed.weight.T)
    torch.manual_seed(0)
    assert 0.018 < build_model(tiny_config(tie_embeddings=True, d_model=64)).lm_head.weight.std() < 0.022


@pytest.mark.parametrize("base", BASES)
def test_grouped_heads_are_repeated_key_and_value_heads(base):
    grouped = tiny(base=base, n_heads=4, n_kv_heads=2).double()
    full = tiny(base=base, n_heads=4).double()
    state = grouped.state_dict()
    for name in state:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(grouped(tokens(2, 19)), full(tokens(2, 19)), rtol=0, atol=1e-12)


# -- positions and the wave branch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_order_of_earlier_tokens_matters(positions):
    # Without positions a single layer of attention would see a bag of tokens.
    module = tiny(base="respsann", positional_encoding=positions, n_layers=1)
    ids = tokens(1, 9)
    swapped = ids.clone()
    swapped[0, [2, 5]] = ids[0, [5, 2]]
    assert ids[0, 2] != ids[0, 5]
    with torch.no_grad():
        assert (module(ids)[0, -1] - module(swapped)[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("n_kv_heads", [2, 1])
def test_one_product_for_q_k_and_v_is_three(n_kv_heads):
    attn = tiny(n_kv_heads=n_kv_heads).blocks[0].attn
    x = torch.randn(2, ENOUGH_TOKENS // 2, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    parts = (attn.q_proj, attn.k_proj, attn.v_proj)
    found = []
    for is_window in (True, False):
        outputs = attn._projected(x, is_window)
        total = sum((output * torch.arange(output.shape[-1])).square().sum() for output in outputs)
        found.append([*outputs, *torch.autograd.grad(total, [x, *(part.weight for part in parts)])])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert [output.shape[-1] for output in found[0][:3]] == [16, 8 * n_kv_heads, 8 * n_kv_heads]


def test_a_projection_with_a_hook_or_of_another_class_is_called():
    """An adapter's part would otherwise be passed over."""
    module, ids = tiny(), tokens(2, ENOUGH_TOKENS)
    plain, part = module(ids), module.blocks[1].attn.k_proj
    handle = part.register_forward_hook(lambda _, given, taken: taken * 2)
    hooked = module(ids)
    handle.remove()
    assert torch.equal(module(ids), plain) and not torch.allclose(hooked, plain)
    module.blocks[1].attn.k_proj = nn.Sequential(part)
    with torch.no_grad():
        part.weight *= 2
    torch.testing.assert_close(module(ids), hooked)


def test_alibi_slopes_are_blooms():
    for heads in range(1, 21):
        power = 2 ** math.floor(math.log2(heads))
        ratio = 2 ** (-8 / power)
        slopes = [ratio ** (i + 1) for i in range(power)]
        finer = 2 ** (-8 / (2 * power))
        slopes += [finer ** (i + 1) for i in range(0, 2 * (heads - power), 2)]
        torch.testing.assert_close(alibi_slopes(heads), torch.tensor(slopes, dtype=torch.float32))


def test_sinusoidal_positions_are_the_formulas():
    table = sinusoidal(torch.tensor([0, 1, 5000]), 6)
    for row, position in zip(table, (0, 1, 5000)):
        for pair in range(3):
            angle = position / 10000 ** (2 * pair / 6)
            assert row[2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-3)
            assert row[2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-3)


@pytest.mark.parametrize("kernel, dilations", [(4, (1, 2)), (2, (5,)), (3, (2, 3)), (1, (1,))])
def test_the_wave_branch_reaches_as_far_back_as_its_taps(kernel, dilations):
    module = tiny(base="waveresnet", wave_kernel=kernel, wave_dilations=dilations)
    for block in module.blocks:
        nn.init.zeros_(block.attn.o_proj.weight)
    reach = sum((kernel - 1) * dilations[layer % len(dilations)] for layer in range(2))
    assert module.wave_state_lengths() == [(kernel - 1) * dilations[layer % len(dilations)] for layer in range(2)]
    ids = tokens(1, 30)
    seen = []
    with torch.no_grad():
        before = module(ids)[0, -1]
        for place in range(30):
            changed = ids.clone()
            changed[0, place] = (ids[0, place] + 1) % VOCABULARY
            if not torch.equal(module(changed)[0, -1], before):
                seen.append(29 - place)
    # The taps of both layers, added up in every combination.
    taps = [{j * dilations[layer % len(dilations)] for j in range(kernel)} for layer in range(2)]
    assert set(seen) == {a + b for a in taps[0] for b in taps[1]} and max(seen) == reach


# -- options that change the calculation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_dropout_acts_in_training_only(base):
    module = tiny(base=base, dropout=0.5)
    plain = tiny(base=base)
    plain.load_state_dict(module.state_dict())
    ids = tokens(2, 11)
    with torch.no_grad():
        assert torch.equal(module(ids), plain(ids))
        module.train(), plain.train()
        assert torch.equal(plain(ids), plain(ids))
        torch.manual_seed(1)
        first = module(ids)
        assert not torch.equal(first, module(ids))
        torch.manual_seed(1)
        assert torch.equal(first, module(ids))


def test_dropout_acts_on_embedding_and_every_projection():
    module = tiny(base="waveresnet", dropout=0.5)
    acting = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Dropout):
            part.register_forward_hook(lambda _, given, taken, name=name: acting.append((name, bool((taken == 0).any()))))
    module.train()(tokens(2, 11))
    parts = [f"blocks.{i}.{part}.dropout" for i in range(2) for part in ("wave", "attn", "mlp")]
    assert sorted(acting) == sorted((name, True) for name in ["dropout", *parts])


@EVERY_MODEL
def test_a_float64_model_is_wide_throughout(base, positions):
    module = tiny(base=base, positional_encoding=positions)
    ids, starts = tokens(2, 21), starts_at((2, 21), (0, 4))
    with torch.no_grad():
        narrow = module(ids, starts)
        wide = module.double()(ids, starts)
    assert wide.dtype == torch.float64
    difference = (narrow.double() - wide).abs().max().item()
    assert 0 < difference < 2e-5 * wide.abs().max().item() + 2e-5
    # Had a table or an op been narrow, a step this small would vanish in float32 rounding.
    module.embed.weight.data += 1e-12
    with torch.no_grad():
        moved = (module(ids, starts) - wide).abs().max().item()
    assert 0 < moved < 1e-8


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_run(base, dtype):
    module = tiny(base=base)
    with torch.no_grad():
        wide = module(tokens(2, 21))
        narrow = module.to(dtype)(tokens(2, 21))
    assert narrow.dtype == dtype
    # Two blocks of sines with frequency 3 made 4 to 10 roundings' worth of it over a dozen draws of the weights.
    assert 0 < (narrow.float() - wide).norm() < 16 * torch.finfo(dtype).eps * wide.norm()


@pytest.mark.parametrize(
    "base, positions, packed", [("waveresnet", "rope", True), ("respsann", "alibi", False), ("respsann", "sinusoidal", True)]
)
def test_compiles_without_graph_break(base, positions, packed):
    module = tiny(base=base, positional_encoding=positions, n_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    ids, starts = tokens(2, 10), starts_at((2, 10), (0, 3), (1, 8)) if packed else None
    results = []
    for run in (module, compiled):
        module.zero_grad()
        logits = run(ids, starts)
        logits.square().mean().backward()
        results.append((logits.detach(), [p.grad.clone() for p in module.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# -- bases of one's own ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_bases(monkeypatch):
    monkeypatch.setattr(registry, "_BASES", dict(registry._BASES))


def test_register_base(own_bases):
    class Doubled(ResPSANNBlock):
        def forward(self, x, where, layer):
            return 2 * super().forward(x, where, layer)

    register_base("doubled", lambda config: LanguageModel(config, Doubled))
    module, ids = tiny(base="doubled"), tokens(1, 7)
    assert isinstance(module.blocks[1], Doubled) and module.config.base == "doubled"
    plain = tiny(base="respsann")
    with torch.no_grad():
        assert not torch.allclose(module(ids), plain(ids))


def test_register_base_refuses_a_taken_name(own_bases):
    with pytest.raises(ValueError, match="register_base: 'respsann' is taken; choose another name than respsann, waveresnet"):
        register_base("respsann", lambda config: None)


def test_an_unknown_base_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="base is 'resnet'; choose one of 'respsann', 'waveresnet', or add it with register_base"):
        build_model(tiny_config(base="resnet"))


def test_a_model_without_a_vocabulary_says_so():
    with pytest.raises(ValueError, match="config.vocab_size is None; give the number of token ids"):
        build_model(tiny_config(vocab_size=None))
