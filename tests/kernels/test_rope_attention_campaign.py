"""rope_attention on random calls: `pytest -m campaign tests/kernels/test_rope_attention_campaign.py`."""

import math
import random

import pytest
import torch
from psann_kernels.rope_attention import OP
from test_rope_attention import NAMES, Case, run, witnesses
from witness import BACKENDS, FORWARD, GRADIENT, Budget, judge

TOKENS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130]
HEAD_DIMS = [16, 24, 40, 64, 96, 128]
LEAST = 128  # elements, so that their maxima mean something


def draw(seed: int, values: int = 0) -> Case:
    """A random call: lengths around every tile's edge, empty documents anywhere, groups of 1 to 8.

    values  which draw of the tensors, for the same shapes
    """
    r = random.Random(seed)
    tokens = r.choice(TOKENS)
    keys = tokens if r.random() < 0.6 else r.choice(TOKENS)
    head_dim = r.choice(HEAD_DIMS)
    # The interpreter takes seconds for many heads of long rows, so those are drawn less often.
    group = r.randint(1, 8 if max(tokens, keys) <= 33 or r.random() < 0.1 else 2)
    kv_heads = r.randint(1, 2) if group <= 2 else 1
    shortest = min(tokens, keys) * kv_heads * head_dim
    batch = max(r.choice([1, 1, 2]), math.ceil(LEAST / shortest) if shortest else 1)
    documents = None
    if tokens == keys and r.random() < 0.6:
        ends = sorted(r.randint(0, batch * tokens) for _ in range(r.randint(0, 5)))
        ends = sorted([*ends, *r.choices([0, *ends, batch * tokens], k=r.randint(0, 3)), batch * tokens])
        documents = [end - start for start, end in zip([0, *ends], ends)]
    return Case(
        tokens, head_dim, batch=batch, keys=keys, heads=(group * kv_heads, kv_heads), documents=documents, seed=seed + values,
        rotary=r.choice(["pairs", "halves", None]), window=r.choice([None, None, r.randint(1, 140)]), alibi=r.random() < 0.3,
        dtype=r.choice([torch.float32] * 6 + [torch.float16, torch.bfloat16]),
    )  # fmt: skip


def weight_floor(case: Case) -> float:
    """What making the weights anew from the log-sum-exp costs dv.

    A score is rounded forward and again backward, together by 2^-23 of its terms, which |q| |k| bounds; the weight moves by that
    part of itself. Where a query sees one key its weight is exactly 1 and plain torch's dv has no such error.
    """
    if case.q.numel() == 0 or case.k.numel() == 0:
        return 0.0
    longest = [t.float().norm(dim=-1).max().item() for t in (case.q, case.k)]
    return 2.0**-23 * case.scale * math.prod(longest) * case.do.abs().max().item()


def fill(budgets: dict, seed: int, values: int) -> None:
    case = draw(seed, values)
    floors = (0.0, case.floor(case.k), case.floor(case.q), weight_floor(case))
    for backend in BACKENDS:
        if OP.refusal(backend, case.q, case.k, case.v) is not None:
            continue
        # A sum of 96 terms in order errs up to 7 times as much as one in blocks (campaign seed 4028162786, case 1600: to the bit
        # what the interpreter's product of two rows gives), so both orders are plain torch here.
        in_order = run(case.formula(case.q.dtype, in_order=True), case.q, case.k, case.v, case.do)
        for name, floor, fast, working, truth, other in zip(NAMES, floors, *witnesses(case, backend), in_order):
            what = f"{backend} {name} of {case.label}, {case.q.dtype}"
            budget = budgets.setdefault((backend, name), Budget(what, FORWARD if name == "o" else GRADIENT))
            budget.floor = max(budget.floor, floor)
            budget.add(fast, working, truth)
            budget.add(fast, other, truth)


@pytest.mark.campaign(weight=3)
def test_random_calls(campaign):
    for seed in campaign:
        judge(lambda budgets, values: fill(budgets, seed, values))
