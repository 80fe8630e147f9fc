"""Twenty training steps on each backend give the losses of plain torch."""

from __future__ import annotations

import pytest
import torch
from psann_fast import ModelConfig, TrainConfig
from psann_fast.data import Examples, pack
from psann_fast.models import build_model
from psann_fast.train.trainer import train
from psann_kernels import OPS, BackendError, explain

STEPS = 20


def example_rows() -> Examples:
    """Documents of 1 to 14 tokens that count upwards by their first token, so that there is something to learn."""
    draw = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(100):
        first, by, length = (int(torch.randint(low, high, (), generator=draw)) for low, high in ((0, 9), (1, 4), (1, 15)))
        documents.append((2 + (first + by * torch.arange(length)) % 9).numpy())
    return Examples(pack(documents, 1, 11), 32, eos_id=1, pad_id=0)


def losses(base: str, backend: str, device: str) -> tuple[list[float], dict[str, str]]:
    """The loss of each step, and which backend served each op."""
    # One layer and one row a step, because Triton's interpreter takes a quarter of a second for them.
    config = ModelConfig(
        base=base,
        d_model=16,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        d_mlp=24,
        vocab_size=11,
        wave_kernel=3,
        wave_dilations=(2,),
        backend=backend,
    )
    torch.manual_seed(0)
    module = build_model(config).to(device)
    # A rate at which a step moves the weights by little of their size: at 2e-2 any rounding grows tenfold every few steps.
    settings = TrainConfig(
        max_steps=STEPS, epochs=99, batch_tokens=32, lr=3e-3, optimizer="adamw", warmup_steps=0, amp="fp32", log_interval_steps=1,
        progress=False,
    )  # fmt: skip
    history = train(module, example_rows(), settings)
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))
    return [row["loss"] for row in history], {row["op"]: row["backend"] for row in explain(module)}


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("base", ["respsann", "waveresnet"])
def test_training_gives_the_losses_of_plain_torch(base, backend):
    # Where there is a GPU the interpreter is off, and Triton serves that.
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    expected, serving = losses(base, "torch", device)
    assert set(serving.values()) == {"torch"}
    assert expected[-1] < 0.8 * expected[0], "little was learnt, so equal losses show little"
    implemented = {name for name in serving if backend in OPS[name].implementations}
    if not implemented:  # the extension could not be built here: a backend asked for by name is never replaced
        with pytest.raises(BackendError, match=f"backend='{backend}'"):
            losses(base, backend, device)
        return
    got, serving_now = losses(base, backend, device)
    assert {name for name, by in serving_now.items() if by == backend} == implemented
    assert got == pytest.approx(expected, rel=1e-4)
