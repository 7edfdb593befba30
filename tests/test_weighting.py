"""Teacher weights sum to one."""

from __future__ import annotations

from fractions import Fraction

import pytest

from vlkd.errors import UserError
from vlkd.weighting import fixed_weights, uniform_weights


@pytest.mark.parametrize("teachers", [1, 2, 3, 7])
def test_uniform_weights(teachers):
    assert uniform_weights(teachers) == (float(Fraction(1, teachers)),) * teachers


def test_no_teacher_has_no_weight():
    assert uniform_weights(0) == ()


def test_fixed_weights_keep_their_proportions():
    assert fixed_weights((3, 1), 2) == (0.75, 0.25)
    assert fixed_weights((0, 2), 2) == (0.0, 1.0)
    assert fixed_weights((5, 5, 5, 5), 4) == uniform_weights(4)


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1), (-1, 2), (0, 0), (float("nan"), 1)])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(UserError, match="for 2 teachers"):
        fixed_weights(weights, 2)
