"""Training: what a step computes, when it happens, what it leaves behind."""

from __future__ import annotations

import csv
import logging
import math

import numpy as np
import pytest
import torch
from psann_fast import TrainConfig, psannLM
from psann_fast.data import IGNORED, Examples, pack
from psann_fast.train import guard, speed, trainer
from psann_fast.train.optim import build_optimizers, learning_rate, warmup_length
from psann_fast.train.precision import cpu_has_bf16, resolve_amp, resolve_device
from psann_fast.train.run_folder import COLUMNS
from psann_fast.train.guard import Guard, TrainingDiverged
from psann_fast.train.trainer import Plan, batch_loss, evaluate, train
from tiny import BASES, data, fitted, model, tiny, tokens
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


def examples(documents: int = 20, window: int = 8, packed: bool = True, seed: int = 0) -> Examples:
    """Random tokens 2 to 28 in documents of 1 to 12 tokens: rows have different numbers of targets unless packed."""
    lengths = np.random.default_rng(seed).integers(1, 13, documents)
    stream = pack([tokens(n, seed=seed + i, vocab_size=27).numpy() + 2 for i, n in enumerate(lengths)], 1, 29)
    return Examples(stream, window, eos_id=1, pad_id=0, pack=packed)


def config(**options) -> TrainConfig:
    usual = {"batch_tokens": 64, "log_interval_steps": 1, "progress": False, "amp": "fp32", "lr": 1e-3, "optimizer": "adamw"}
    return TrainConfig(**{**usual, **options})


@pytest.fixture
def stepped():
    """[(lr, weight decays, gradients)] of every optimizer step, as the optimizer sees them."""
    steps = []

    def before_step(optimizer, args, kwargs):
        groups = optimizer.param_groups
        steps.append(
            ([g["lr"] for g in groups], [g["weight_decay"] for g in groups], [p.grad.clone() for g in groups for p in g["params"]])
        )

    handle = register_optimizer_step_pre_hook(before_step)
    yield steps
    handle.remove()


def norm_of(gradients) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


# -- accumulation ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_k_micro_batches_of_b_are_one_of_kb(stepped, packed):
    # Documents of every length: the last step has fewer micro-batches, and the last of those fewer rows.
    rows = examples(36, packed=packed)
    assert len(rows) % 8 and len(rows) % 2
    runs = []
    for batch_tokens, accumulation in ((64, 1), (16, 4), (32, 2)):
        module = tiny().double()
        history = train(module, rows, config(batch_tokens=batch_tokens, grad_accum_steps=accumulation))
        runs.append((history, [p.detach() for p in module.parameters()], [gradients for _, _, gradients in stepped]))
        stepped.clear()
    for history, weights, gradients in runs[1:]:
        assert len(history) == len(runs[0][0]) == math.ceil(len(rows) / 8)
        for row, whole in zip(history, runs[0][0]):
            assert row["loss"] == pytest.approx(whole["loss"], rel=1e-6) and row["tokens"] == whole["tokens"]
        for mine, whole in zip(gradients, runs[0][2]):
            torch.testing.assert_close(mine, whole, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(weights, runs[0][1], rtol=1e-6, atol=1e-6)


def test_each_target_counts_once_in_an_epoch():
    rows = examples(37, packed=False)
    history = train(tiny(), rows, config(batch_tokens=32, epochs=2))
    assert history[-1]["tokens"] == 2 * rows.target_tokens
    per_step = np.diff([0] + [row["tokens"] for row in history])
    assert len(set(per_step.tolist())) > 1, "the steps have equal numbers of targets, so a wrong denominator would not show"


# -- the loss -------------------------------------------------------------------------------------------------------------------


def test_label_smoothing_is_its_formula():
    module, batch = tiny(), examples().batch([0, 1, 2])
    with torch.no_grad():
        log_p = F.log_softmax(module(batch["input_ids"], batch["document_starts"]), -1)
        targets = batch["targets"]
        real = targets != IGNORED
        nll = -log_p.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
        for smoothing in (0.0, 0.1, 0.5):
            expected = ((1 - smoothing) * nll - smoothing * log_p.mean(-1))[real].sum()
            torch.testing.assert_close(batch_loss(module, batch, torch.device("cpu"), smoothing), expected)


def test_the_loss_of_a_model_is_that_of_its_logits():
    """A base of LanguageModel never holds all logits; one that only has a forward, or another projection, goes through them."""

    class Other(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.inner = module

        def forward(self, input_ids, document_starts=None):
            return self.inner(input_ids, document_starts)

    module, batch = tiny().double(), examples().batch([0, 1, 2])
    losses = []
    for wrapped in (module, Other(module)):
        module.zero_grad()
        loss = batch_loss(wrapped, batch, torch.device("cpu"), 0.1)
        loss.backward()
        losses.append((loss.detach(), [p.grad.clone() for p in module.parameters()]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-12)


def test_padding_has_no_part_in_the_loss():
    rows = examples(packed=False)
    batch = rows.batch(np.arange(len(rows)))
    padding = batch["targets"] == IGNORED
    assert padding.any()
    changed = {**batch, "input_ids": torch.where(padding, 5, batch["input_ids"])}
    module = tiny()
    with torch.no_grad():
        losses = [batch_loss(module, b, torch.device("cpu")).item() for b in (batch, changed)]
    assert losses[0] == losses[1]


def test_validation_is_the_mean_over_all_targets_in_eval_mode():
    module = tiny(dropout=0.5).train()
    rows = examples(13, packed=False)
    batch = rows.batch(np.arange(len(rows)))
    module.eval()
    with torch.no_grad():
        expected = batch_loss(module, batch, torch.device("cpu")).item() / rows.target_tokens
    module.train()
    for size in (1, 3, 100):
        assert evaluate(module, rows, size) == pytest.approx(expected, rel=1e-6)
    assert module.training
    texts_alone = evaluate(module, rows, 3, count_separators=False)
    real = (batch["targets"] != 1) & (batch["targets"] != IGNORED)
    module.eval()
    with torch.no_grad():
        log_p = F.log_softmax(module(batch["input_ids"], batch["document_starts"]), -1)
    assert texts_alone == pytest.approx(
        -log_p.gather(-1, batch["targets"].clamp_min(0)[..., None])[..., 0][real].mean().item(), rel=1e-5
    )


# -- the optimizer --------------------------------------------------------------------------------------------------------------


def test_gradients_are_clipped_to_a_global_norm(stepped):
    history = train(tiny(), examples(), config(max_steps=3, grad_clip=0.05))
    for row, (_, _, gradients) in zip(history, stepped):
        assert row["grad_norm"] > 0.1, "the row says the norm before clipping"
        assert norm_of(gradients) == pytest.approx(0.05, rel=1e-3)
    stepped.clear()
    for grad_clip in (0, 1e6):
        history = train(tiny(), examples(), config(max_steps=3, grad_clip=grad_clip))
        for row, (_, _, gradients) in zip(history, stepped):
            assert norm_of(gradients) == pytest.approx(row["grad_norm"], rel=1e-5)
        stepped.clear()


@pytest.mark.parametrize("most", [0.5, 4.999998, 4.999999, 5.0, 5.000001, 5.000002, 9.0, math.inf])
@pytest.mark.parametrize("worst", [4.0, math.nan, math.inf])
def test_clipping_is_torchs_to_the_bit(most, worst):
    def parameters():
        found = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 2, 3)]
        found[0].grad, found[1].grad = torch.tensor([3.0]), torch.tensor([0.0, worst])
        return found

    ours, theirs = parameters(), parameters()
    norms = trainer.clip(ours, most), torch.nn.utils.clip_grad_norm_(theirs, most)
    torch.testing.assert_close(*norms, rtol=0, atol=0, equal_nan=True)
    for one, other in zip(ours[:2], theirs[:2]):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)
    assert ours[2].grad is None


@pytest.mark.parametrize("base", BASES)
def test_only_matrices_decay(base):
    weights = []
    for decay in (0.0, 0.5):
        module = tiny(base=base)
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        train(module, examples(), config(max_steps=1, lr=0.01, weight_decay=decay))
        weights.append({name: p.detach() for name, p in module.named_parameters()})
    for name, plain in weights[0].items():
        # The first step of AdamW: w (1 - lr decay) - lr sign-like update, and the update is the same in both runs.
        expected = plain - 0.01 * 0.5 * before[name] if plain.dim() >= 2 else plain
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-5, atol=1e-7)
    vectors = {name.rpartition(".")[2] for name, p in before.items() if p.dim() < 2}
    assert vectors == {"bias", "scale", "_A", "_f", "_d", "alpha"}


@pytest.mark.parametrize("base", BASES)
def test_muon_takes_the_products_of_the_blocks_and_adamw_the_rest(base):
    module = tiny(base=base)
    adamw, muon = build_optimizers(module, config(optimizer="muon", weight_decay=0.3))
    names = {p: name for name, p in module.named_parameters()}
    orthogonal = {names[p] for group in muon.param_groups for p in group["params"]}
    ends = {".".join(name.split(".")[2:]) for name in orthogonal}
    products = {f"{name}.weight" for name in "attn.q_proj attn.k_proj attn.v_proj attn.o_proj mlp.fc1 mlp.fc2".split()}
    assert ends == products | ({"wave.out_proj.weight"} if base == "waveresnet" else set())
    rest = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert sorted([*rest, *orthogonal]) == sorted(names.values()), "each parameter learns once"
    assert {"embed.weight", "lm_head.weight"} <= set(rest) and muon.param_groups[0]["weight_decay"] == 0.3
    history = train(module, examples(60), config(optimizer="muon", epochs=9, max_steps=40, lr=0.02))
    assert history[-1]["loss"] < history[0]["loss"] - 0.1
    assert muon.param_groups[0]["lr"] == 0.001, "its rate follows the schedule only in training"


def test_utilization_is_six_flop_a_parameter_and_token(monkeypatch):
    module = tiny()
    monkeypatch.setattr(speed, "matmul_rate", lambda device, dtype: {torch.float32: 1e9, torch.bfloat16: 4e9}[dtype])
    wanted = 1000 * 6 * module.num_parameters() / 1e9
    assert speed.utilization(1000, module, None) == pytest.approx(wanted)
    assert speed.utilization(1000, module, torch.bfloat16, 2) == pytest.approx(wanted / 8)
    monkeypatch.undo()
    assert 1e8 < speed.matmul_rate(torch.device("cpu"), torch.float32) < 1e14


@pytest.mark.campaign(weight=0.1)
def test_a_compiled_run_is_an_eager_one():
    options = dict(epochs=9, max_steps=8)
    runs = [
        [row["loss"] for row in fitted(model(base="waveresnet"), compile=wanted, **options).history_] for wanted in (False, True)
    ]
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


@pytest.mark.parametrize("base", BASES)
def test_frozen_sine_parameters_do_not_move(base):
    for options, frozen in (({"sine_trainable": False}, "_A _f _d"), ({"sine_learnable": ("frequency",)}, "_A _d"), ({}, "")):
        module = tiny(base=base, **options)
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        train(module, examples(), config(max_steps=2))
        for name, p in module.named_parameters():
            is_still = torch.equal(p, before[name])
            assert is_still == (name.rpartition(".")[2] in frozen.split()), name


def test_equal_seeds_give_equal_runs_and_others_do_not():
    runs = []
    for outer, seed in enumerate((1, 1, 2)):
        module = tiny(dropout=0.1)
        torch.manual_seed(outer)
        history = train(module, examples(), config(seed=seed, max_steps=3))
        runs.append([row["loss"] for row in history])
        drawn = torch.rand(1)
        torch.manual_seed(outer)
        assert torch.equal(drawn, torch.rand(1)), "training moved the caller's random state"
    assert runs[0] == runs[1] != runs[2]


# -- the schedule ---------------------------------------------------------------------------------------------------------------


def rates_of(stepped) -> list[float]:
    assert all(len(set(rates)) == 1 for rates, _, _ in stepped)
    return [rates[0] for rates, _, _ in stepped]


def test_warmup_then_a_line_to_the_ratio(stepped):
    history = train(tiny(), examples(60), config(max_steps=40, epochs=9, lr=0.01, warmup_steps=4, min_lr_ratio=0.1))
    rates = rates_of(stepped)
    assert len(rates) == 40 and [row["lr"] for row in history] == rates
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    for step in range(4, 40):
        along = (step - 4) / (40 - 4)
        assert rates[step] == pytest.approx(0.01 * (0.1 + 0.9 * (1 - along)))
    assert rates[-1] > 0.001 and max(rates) == pytest.approx(0.01)
    settings = config(lr=0.01, min_lr_ratio=0.1)
    assert learning_rate(40, 40, 4, settings) == pytest.approx(0.001), "the minimum comes after the last step"


def test_the_last_step_moves_the_weights(monkeypatch):
    # A rate of 0 at the last step wastes it.
    module = tiny()
    before = {}

    def before_last(optimizer, args, kwargs):
        before.update({name: p.detach().clone() for name, p in module.named_parameters()})

    handle = register_optimizer_step_pre_hook(before_last)
    try:
        train(module, examples(60), config(max_steps=5, epochs=9, lr=0.1, weight_decay=0))
    finally:
        handle.remove()
    assert all((p - before[name]).abs().max() > 1e-4 for name, p in module.named_parameters())


@pytest.mark.parametrize(
    "options, steps",
    [(dict(epochs=2), 6), (dict(epochs=2, max_steps=4), 4), (dict(epochs=2, max_steps=99), 6), (dict(epochs=5, max_steps=9), 9)],
)
def test_a_call_ends_at_the_smaller_of_epochs_and_max_steps_and_so_does_the_schedule(stepped, options, steps):
    rows = examples(19)
    assert math.ceil(len(rows) / 8) == 3, "the sizes below count on three steps an epoch"
    history = train(tiny(), rows, config(warmup_steps=0, min_lr_ratio=0.25, lr=0.01, **options))
    rates = rates_of(stepped)
    assert len(rates) == steps == history[-1]["step"]
    last = 0.25 + 0.75 * (1 - (steps - 1) / steps)
    assert rates[0] == pytest.approx(0.01) and rates[-1] == pytest.approx(0.01 * last)
    assert [row["epoch"] for row in history] == [1 + step // 3 for step in range(steps)]


def test_a_short_run_shortens_the_warmup_and_says_so(stepped, caplog):
    with caplog.at_level(logging.INFO, "psann_fast"):
        train(tiny(), examples(60), config(max_steps=30, epochs=9, warmup_steps=100, lr=0.01))
    assert [record.message for record in caplog.records] == ["warmup_steps 100 is shortened to 3, a tenth of this run's 30 steps"]
    assert rates_of(stepped)[:4] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01], rel=1e-2)
    caplog.clear()
    with caplog.at_level(logging.INFO, "psann_fast"):
        assert warmup_length(TrainConfig(warmup_steps=100), 1000) == 100 and warmup_length(TrainConfig(warmup_steps=0), 5) == 0
    assert not caplog.records


@pytest.mark.parametrize("steps", [1, 2, 3, 11])
@pytest.mark.parametrize("warmup_steps", [0, 1, 100])
def test_no_run_is_too_short_for_its_schedule(steps, warmup_steps):
    settings = TrainConfig(lr=1.0, warmup_steps=warmup_steps)
    warmup = warmup_length(settings, steps)
    rates = [learning_rate(step, steps, warmup, settings) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates) and max(rates) == 1.0


def test_the_plan():
    rows = examples(19)  # 19 rows or so of 8 tokens
    for batch_tokens, per_batch in ((1, 1), (8, 1), (15, 1), (16, 2), (64, 8)):
        plan = Plan.of(rows, config(batch_tokens=batch_tokens, epochs=3))
        assert (
            plan.rows == per_batch
            and plan.steps_per_epoch == math.ceil(len(rows) / per_batch)
            and plan.total_steps == 3 * plan.steps_per_epoch
        )
    assert Plan.of(rows, config(batch_tokens=8, grad_accum_steps=4)).steps_per_epoch == math.ceil(len(rows) / 4)


# -- precision ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp, expected", [("bf16", torch.bfloat16), ("fp32", torch.float32), ("none", torch.float32)])
def test_autocast_is_real_on_a_cpu(amp, expected):
    lm = model(base="waveresnet")
    products, sines = set(), set()
    lm.module.blocks[0].attn.q_proj.register_forward_hook(lambda _, args, out: products.add(out.dtype))
    lm.module.blocks[0].mlp.act.register_forward_hook(lambda _, args, out: sines.update((args[0].dtype, out.dtype)))
    fitted(lm, max_steps=2, amp=amp)
    assert products == sines == {expected}
    assert {p.dtype for p in lm.module.parameters()} == {torch.float32}


def test_bf16_learns_as_float32_does():
    losses = {
        amp: [row["loss"] for row in fitted(model(), max_steps=30, epochs=30, lr=0.01, amp=amp).history_]
        for amp in ("bf16", "fp32")
    }
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"][0] == pytest.approx(losses["fp32"][0], rel=0.01)
    ends = [sum(rows[-10:]) / 10 for rows in losses.values()]
    assert ends[0] == pytest.approx(ends[1], rel=0.02) and ends[0] < losses["bf16"][0] - 1


def test_what_amp_means_on_a_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_amp("auto", cuda) == resolve_amp("bf16", cuda) == resolve_amp("bf16", cpu) == torch.bfloat16
    assert resolve_amp("fp16", cuda) == torch.float16 and resolve_amp("fp32", cuda) is resolve_amp("none", cpu) is None
    assert resolve_amp("auto", cpu) == (torch.bfloat16 if cpu_has_bf16() else None)
    with pytest.raises(ValueError, match="amp is 'fp16', which torch does not train with on a CPU; use amp='bf16', or 'fp32'"):
        resolve_amp("fp16", cpu)


def test_what_device_means(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda") and resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device is 'cuda:2', but this machine has 2 CUDA GPUs; use 'cuda:0' or 'auto'"):
        resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


# -- NaN ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_training_before_it_moves_a_weight(poison, where):
    module, calls, before = tiny(), [], {}

    def spoil(_, args, out):
        calls.append(1)
        if len(calls) < 3:
            return out
        before.update({name: p.detach().clone() for name, p in module.named_parameters()})
        if where == "loss":
            return out * poison
        out.register_hook(lambda gradient: gradient * poison)
        return out

    module.register_forward_hook(spoil)
    saved = []
    with pytest.raises(TrainingDiverged, match=r"optimizer step 3; the weights are those before it. Lower lr \(it is 0.001\)"):
        train(module, examples(), config(epochs=9, save_interval_steps=1), save=lambda name, _: saved.append(name))
    assert len(calls) == 3 and saved == ["last", "last"]
    assert before and all(torch.equal(p, before[name]) and p.isfinite().all() for name, p in module.named_parameters())
    assert not module.training


def test_fit_that_diverges_keeps_the_last_good_checkpoint(tmp_path):
    lm, calls = model(), []
    lm.module.register_forward_hook(lambda _, args, out: out * math.nan if calls.append(1) or len(calls) > 2 else out)
    with pytest.raises(TrainingDiverged):
        fitted(lm, checkpoint_dir=tmp_path, save_interval_steps=1)
    loaded = psannLM.load(tmp_path, device="cpu").module
    assert all(torch.equal(p, q) and p.isfinite().all() for p, q in zip(loaded.parameters(), lm.module.parameters()))
    assert len(list(csv.DictReader(open(tmp_path / "metrics.csv")))) == 2


@pytest.fixture(params=["looks at every step", "looks when a row is logged"])
def looking(request, monkeypatch):
    """Both ways of a Guard; the second is how it works on a GPU, where looking would wait for the device."""
    is_gpu = request.param == "looks when a row is logged"
    if is_gpu:
        monkeypatch.setattr(
            trainer, "Guard", type("OnGPU", (Guard,), {"waits": property(lambda self: False, lambda self, value: None)})
        )
    return is_gpu


def poisoned(module, *steps: int) -> list[dict[str, torch.Tensor]]:
    """Makes the loss of these steps NaN; returns the list that receives the weights before each step."""
    held = []

    def spoil(_, args, out):
        held.append({name: p.detach().clone() for name, p in module.named_parameters()})
        return out * math.nan if len(held) in steps else out

    module.register_forward_hook(spoil)
    return held


def is_at(module, weights) -> bool:
    return all(torch.equal(p, weights[name]) for name, p in module.named_parameters())


def test_stop_keeps_the_weights_before_the_failing_step_however_late_it_is_seen(looking):
    module, saved = tiny(), []
    held = poisoned(module, 3)  # and never again: later steps could move the weights
    with pytest.raises(TrainingDiverged, match="loss is nan .* at optimizer step 3; the weights are those before it"):
        train(
            module,
            examples(),
            config(epochs=9, max_steps=9, log_interval_steps=100, save_interval_steps=5),
            save=lambda name, _: saved.append(name),
        )
    assert len(held) == (5 if looking else 3) and saved == [], "seen at the save of step 5 at the latest"
    assert is_at(module, held[2]) and not is_at(module, held[1])


def test_skip_leaves_out_the_failing_steps_alone(looking, caplog):
    module = tiny()
    held = poisoned(module, 3, 6)
    history = train(module, examples(), config(epochs=9, max_steps=8, nan_policy="skip"))
    still = [all(torch.equal(after[name], before[name]) for name in after) for before, after in zip(held, held[1:])]
    assert still == [False, False, True, False, False, True, False]
    assert [row["skipped_steps"] for row in history] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [math.isnan(row["loss"]) for row in history] == [step in (3, 6) for step in range(1, 9)]
    assert "at optimizer step 3: 1 steps skipped so far" in caplog.text and "at optimizer step 6: 2 steps" in caplog.text
    # Moments and Adam's count of steps were left alone too: the same as a run that never had those batches' steps.
    assert all(p.isfinite().all() for p in module.parameters())


def test_skip_gives_up_after_twenty_in_a_row(looking):
    module = tiny()
    held = poisoned(module, *range(3, 100))
    with pytest.raises(
        TrainingDiverged, match=f"{guard.MOST_SKIPS_IN_A_ROW} steps in a row were skipped; the weights are those before"
    ):
        train(module, examples(60), config(epochs=99, max_steps=60, nan_policy="skip"))
    assert len(held) == 2 + guard.MOST_SKIPS_IN_A_ROW and is_at(module, held[2])


def test_float16_skips_overflow_and_stops_where_it_never_ends(monkeypatch):
    # float16 is refused on a CPU because it is slow there; what it does is the same.
    monkeypatch.setattr(trainer, "resolve_amp", lambda amp, device: torch.float16)
    module = tiny()
    held = poisoned(module, 3)
    history = train(module, examples(), config(epochs=9, max_steps=6))
    assert [row["skipped_steps"] for row in history] == [0, 0, 1, 1, 1, 1] and is_at(module, held[0]) is False
    assert all(torch.equal(held[3][name], held[2][name]) for name in held[2])
    module = tiny()
    held = poisoned(module, *range(3, 100))
    with pytest.raises(TrainingDiverged, match="steps in a row were skipped"):
        train(module, examples(60), config(epochs=99, max_steps=60))
    assert is_at(module, held[2]) and len(held) <= 2 + guard.MOST_SKIPS_IN_A_ROW


def test_weights_that_are_not_finite_are_never_saved():
    module, saved = tiny(), []

    def overflow(optimizer, args, kwargs):
        if len(seen) == 3:
            module.blocks[0].mlp.fc1.bias.data[1] = math.inf
        seen.append(1)

    seen = []
    handle = register_optimizer_step_post_hook(overflow)
    try:
        with pytest.raises(TrainingDiverged, match="a weight is NaN or infinite after optimizer step 4; nothing was saved since"):
            train(module, examples(), config(epochs=9, save_interval_steps=2), save=lambda name, _: saved.append(len(seen)))
    finally:
        handle.remove()
    assert saved == [2]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, TrainingDiverged])
def test_history_is_that_of_this_fit_when_it_ends_early(ending):
    lm = fitted(max_steps=5, epochs=9)

    def end(_, args, out):
        calls.append(1)
        if len(calls) == 3:
            if ending is KeyboardInterrupt:
                raise KeyboardInterrupt
            return out * math.nan
        return out

    calls = []
    lm.module.register_forward_hook(end)
    with pytest.raises(ending):
        fitted(lm, lr=0.0123)
    assert [row["step"] for row in lm.history_] == [1, 2] and lm.history_[0]["lr"] == 0.0123


# -- validation and checkpoints -------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(monkeypatch):
    module, losses, kept = tiny(), iter([3.0, 1.0, 2.0, 0.5, 0.5, 4.0]), []
    monkeypatch.setattr(trainer, "_mean_loss", lambda *args, **options: next(losses))
    history = train(
        module,
        examples(60),
        config(epochs=9, max_steps=12, eval_interval_steps=2, log_interval_steps=5, save_interval_steps=5),
        val_examples=examples(),
        save=lambda name, snapshot: kept.append((name, snapshot.step)),
    )
    assert [(row["step"], row["val_loss"]) for row in history if row["val_loss"] is not None] == [
        (2, 3.0),
        (4, 1.0),
        (6, 2.0),
        (8, 0.5),
        (10, 0.5),
        (12, 4.0),
    ]
    assert kept == [("best", 2), ("best", 4), ("last", 5), ("best", 8), ("last", 10), ("last", 12)]
    # Logged every fifth step from the first, at each validation, and at the last.
    assert [row["step"] for row in history] == [1, 2, 4, 6, 8, 10, 11, 12]


def test_best_and_last_in_a_run_folder(tmp_path):
    # The validation text is of another language than the training text, so learning one unlearns the other.
    prepared, foreign = data(), data()
    foreign = type(prepared)(["zxqj" * 30], tokenizer=prepared.tokenizer, max_length=16)
    lm = model().fit(
        prepared,
        foreign,
        batch_tokens=64,
        epochs=9,
        max_steps=20,
        lr=0.02,
        warmup_steps=0,
        eval_interval_steps=1,
        progress=False,
        checkpoint_dir=tmp_path,
        amp="fp32",
    )
    val_losses = [row["val_loss"] for row in lm.history_]
    assert len(val_losses) == 20 and min(val_losses) < val_losses[-1] - 0.05
    best, last = (psannLM.load(folder, device="cpu") for folder in (tmp_path / "best", tmp_path))
    rows = max(1, 64 // foreign.dataset.window)
    assert evaluate(best.module, foreign.dataset, rows) == pytest.approx(min(val_losses), rel=1e-6)
    assert evaluate(last.module, foreign.dataset, rows) == pytest.approx(val_losses[-1], rel=1e-6)


def test_a_run_folder_holds_what_happened(tmp_path):
    lm = fitted(
        model(), data(val_split=0.3), max_steps=7, epochs=9, log_interval_steps=3, eval_interval_steps=4, checkpoint_dir=tmp_path
    )
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS) and [int(row["step"]) for row in rows] == [1, 4, 7] == [
        row["step"] for row in lm.history_
    ]
    for written, row in zip(rows, lm.history_):
        for name in COLUMNS:
            assert written[name] == ("" if row[name] is None else str(row[name]))
    assert [row["val_loss"] is None for row in lm.history_] == [True, False, False]
    assert all(row["tokens_per_second"] > 0 and row["seconds"] > 0 for row in lm.history_)
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (tmp_path / "loss.png").stat().st_size > 5000
    settings = (tmp_path / "config.yaml").read_text()
    assert "max_steps: 7" in settings and "d_model: 16" in settings and "val_split: 0.3" in settings
    assert (tmp_path / "best" / "manifest.json").is_file()


def test_a_folder_that_is_used_again_keeps_both_runs(tmp_path):
    for steps in (2, 3, 1):
        fitted(max_steps=steps, checkpoint_dir=tmp_path)
    runs = {}
    for name in ("metrics-001.csv", "metrics-002.csv", "metrics.csv"):
        with open(tmp_path / name, newline="") as file:
            runs[name] = list(csv.reader(file))
    assert [len(rows) - 1 for rows in runs.values()] == [2, 3, 1]
    assert all(rows[0] == list(COLUMNS) and COLUMNS[0] not in [row[0] for row in rows[1:]] for rows in runs.values())
    for number, steps in (("-001", 2), ("-002", 3), ("", 1)):
        assert (
            f"max_steps: {steps}" in (tmp_path / f"config{number}.yaml").read_text() and (tmp_path / f"loss{number}.png").is_file()
        )


# -- fit again ------------------------------------------------------------------------------------------------------------------


def test_a_second_fit_continues_from_the_weights():
    lm, prepared = model(), data()
    first = fitted(lm, prepared, epochs=9, max_steps=15, lr=0.02).history_
    second = fitted(lm, prepared, epochs=9, max_steps=6, lr=0.001).history_
    assert [row["step"] for row in second] == [1, 2, 3, 4, 5, 6], "max_steps counts the steps of the call"
    assert second[0]["loss"] < first[0]["loss"] - 0.5 and second[0]["lr"] == pytest.approx(0.001)
    assert lm.history_ is second


def test_training_ends_in_eval_mode_and_learns():
    lm = fitted(model(dropout=0.1), epochs=20, max_steps=60, lr=0.02)
    assert not lm.module.training
    assert lm.history_[-1]["loss"] < lm.history_[0]["loss"] - 2
