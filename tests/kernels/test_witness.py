"""The judge of the random searches: it forgives a draw of few elements, and no fault."""

import pytest
import torch
from witness import FORWARD, Budget, judge


def pooling(errors):
    """pool() of one call whose n-th draw is wrong by errors(n) = (fast, plain); the truth is 0, which has no rounding."""

    def pool(budgets, n):
        fast, plain = (torch.tensor([error]) for error in errors(n))
        budgets.setdefault("y", Budget("y", FORWARD)).add(fast, plain, torch.zeros(1, dtype=torch.float64))

    return pool


def test_one_lucky_draw_of_plain_torch_is_forgiven():
    judge(pooling(lambda n: (1.0, 0.1 if n == 0 else 1.0)))


@pytest.mark.parametrize(
    "errors", [lambda n: (3.0, 1.0), lambda n: (3.0 if n == 0 else 0.0, 1.0)], ids=["always", "in the first draw"]
)
def test_a_fault_is_not_forgiven(errors):
    with pytest.raises(AssertionError, match="error 3.000e.00 exceeds 2.0"):
        judge(pooling(errors))


def test_a_case_that_holds_is_drawn_once():
    drawn = []
    judge(lambda budgets, n: (drawn.append(n), pooling(lambda n: (1.0, 1.0))(budgets, n)))
    assert drawn == [0]
