"""One model that uses every op, compiled as one graph: the ops must trace beside each other, with gradients and with caches."""

import psann_kernels as kernels
import pytest
import torch
from psann_kernels import OPS
from psann_kernels.registry import Op, for_model
from torch import nn

FEATURES, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 4, 2, 8, 4


class EveryOp(nn.Module):
    """A block of each kind, and a loss; `decode` is its attention of new tokens through a paged cache."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.backend = backend
        shapes = {
            "gain": (FEATURES,), "query": (HEADS * HEAD_DIM, FEATURES), "key": (KV_HEADS * HEAD_DIM, FEATURES),
            "value": (KV_HEADS * HEAD_DIM, FEATURES), "out": (FEATURES, HEADS * HEAD_DIM), "taps": (FEATURES, 3),
            "layer": (FEATURES, FEATURES), "up": (24, FEATURES), "down": (FEATURES, 24), "head": (11, FEATURES), "alpha": (1,),
        }  # fmt: skip
        weights = {name: torch.randn(shape, generator=g) * 0.4 for name, shape in shapes.items()}
        sines = {str(size): torch.rand(3, size, generator=g) + 0.2 for size in (FEATURES, 24)}
        self.weights, self.sines = (
            nn.ParameterDict({name: nn.Parameter(t) for name, t in drawn.items()}) for drawn in (weights, sines)
        )
        self.tables = kernels.rotary_tables(32, HEAD_DIM)

    def on(self, name: str) -> str:
        return for_model(self.backend, OPS[name])

    def linear(self, x, name):
        return kernels.linear(x, self.weights[name], backend=self.on("linear"))

    def projected(self, x):
        x = kernels.rms_norm(x, self.weights["gain"], backend=self.on("rms_norm"))
        heads = (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS))
        return [self.linear(x, name).unflatten(-1, (count, HEAD_DIM)) for name, count in heads]

    def forward(self, x, targets):
        o = kernels.rope_attention(*self.projected(x), *self.tables, window=5, backend=self.on("rope_attention"))
        x = x + self.linear(o.flatten(-2), "out")
        x = x + kernels.wave_conv(x, self.weights["taps"], *self.sines[str(FEATURES)], dilation=2, backend=self.on("wave_conv"))
        narrow, wide = self.sines[str(FEATURES)], self.sines["24"]
        x = x + kernels.damped_sine(x, *narrow, backend=self.on("damped_sine"))
        x = x + kernels.linear_damped_sine(x, self.weights["layer"], None, *narrow, backend=self.on("linear_damped_sine"))
        up, down = self.weights["up"], self.weights["down"]
        branch = kernels.damped_sine_mlp(x, up, None, *wide, down, None, backend=self.on("damped_sine_mlp"))
        x = kernels.scaled_add(x, branch, self.weights["alpha"], backend=self.on("scaled_add"))
        return kernels.linear_cross_entropy(x, self.weights["head"], targets, backend=self.on("linear_cross_entropy"))

    def decode(self, x, k_cache, v_cache, block_table, slots, positions, seq_lens, cu_seqlens_q):
        q, k, v = self.projected(x)
        rotary = dict(zip(("cos", "sin"), self.tables))
        kernels.paged_append(k, v, k_cache, v_cache, slots, positions=positions, **rotary, backend=self.on("paged_append"))
        return kernels.paged_attention(
            q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **rotary, backend=self.on("paged_attention")
        )


def trained(run, model):
    """The loss and every gradient."""
    g = torch.Generator().manual_seed(1)
    x, targets = torch.randn(2, 9, FEATURES, generator=g).requires_grad_(), torch.randint(0, 11, (2, 9), generator=g)
    model.zero_grad(set_to_none=True)
    loss = run(x, targets)
    loss.backward()
    return {"loss": loss.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@torch.no_grad()
def decoded(run):
    """Outputs of a prefill of 6 and 3 tokens and of a step of one token each, and the caches that they leave."""
    x = torch.randn(11, FEATURES, generator=torch.Generator().manual_seed(2))
    block_table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
    k_cache, v_cache = (torch.zeros(5, BLOCK_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2))
    found, done, start = {}, [0, 0], 0
    for new in ([6, 3], [1, 1]):
        ends = [d + n for d, n in zip(done, new)]
        positions = torch.cat([torch.arange(d, e) for d, e in zip(done, ends)])
        owner = torch.repeat_interleave(torch.arange(2), torch.tensor(new))
        slots = block_table[owner, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        bounds = torch.tensor([0, new[0], sum(new)], dtype=torch.int32)
        rows = x[start : start + sum(new)]
        found[f"o of {new}"] = run(rows, k_cache, v_cache, block_table, slots, positions, torch.tensor(ends).int(), bounds)
        done, start = ends, start + sum(new)
    return found | {"k_cache": k_cache, "v_cache": v_cache}


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_model_of_every_op_is_one_graph_and_gives_the_same_numbers(backend, monkeypatch):
    model = EveryOp(backend)
    called, select = set(), Op.select
    with monkeypatch.context() as patch:
        patch.setattr(Op, "select", lambda self, *a, **k: called.add(self.name) or select(self, *a, **k))
        for op in OPS.values():
            patch.setattr(op, "at_once", lambda *a, op=op, at_once=op.at_once: called.add(op.name) or at_once(*a))
        eager = trained(model, model) | decoded(model.decode)
    assert called == set(OPS), "an op that this model does not use: give it a place in forward or decode"

    torch._dynamo.reset()
    compiled = trained(torch.compile(model, fullgraph=True, backend="aot_eager"), model)
    compiled |= decoded(torch.compile(model.decode, fullgraph=True, backend="aot_eager"))
    assert compiled.keys() == eager.keys() and all(value is not None for value in eager.values())
    for name, value in compiled.items():
        torch.testing.assert_close(value, eager[name], rtol=1e-6, atol=1e-6, msg=lambda m: f"{name}: {m}")
