"""A model on the native backend is the model on plain torch: the same losses, the same text,
and a table that says what ran where."""

from __future__ import annotations

import pytest
import torch
from psann_fast import psannLM, psannLMDataPrep
from psann_kernels import OPS, explain, native

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason=native.WHY_NOT)

SENTENCES = [
    "The sea was calm and the boat went slowly home.",
    "A red fox ran over the hill, and nobody saw it.",
    "Rain fell all night; in the morning the street was a river.",
]


def fitted(base: str, backend: str) -> psannLM:
    """20 steps from the same start; one loss a step in history_."""
    torch.manual_seed(0)
    lm = psannLM(
        base=base, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=48, vocab_size=258, device="cpu", backend=backend
    )
    lm.module
    data = psannLMDataPrep(SENTENCES, tokenizer="simple", max_length=32)
    # AdamW: Muon rounds its updates to bfloat16 where the CPU has that, and so turns any last bit into a percent.
    return lm.fit(
        data, batch_tokens=128, max_steps=20, epochs=99, lr=3e-3, optimizer="adamw", warmup_steps=0, log_interval_steps=1,
        progress=False, amp="fp32",
    )  # fmt: skip


@pytest.mark.parametrize("base", ["respsann", "waveresnet"])
def test_losses_text_and_table(base):
    plain, fast = fitted(base, "torch"), fitted(base, "native")
    expected = [row["loss"] for row in plain.history_]
    assert len(expected) == 20 and expected[-1] < expected[0] - 0.5, "little was learnt, so equal losses show little"
    assert [row["loss"] for row in fast.history_] == pytest.approx(expected, rel=1e-4)

    prompts = ["The sea", "A red fox ran", ""]
    texts = [lm.generate_batch(prompts, temperature=0, max_new_tokens=24) for lm in (plain, fast)]
    assert texts[0] == texts[1] and all(texts[0])

    rows = {row["op"]: row for row in explain(fast.module)}
    assert {"damped_sine_mlp", "rms_norm", "rope_attention"} <= set(rows)
    for name, row in rows.items():
        is_native = "native" in OPS[name].implementations
        assert row["serves"] == "yes" and row["backend"] == ("native" if is_native else "torch")
        assert is_native or "native does not implement" in row["reason"]
