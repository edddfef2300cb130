import numpy as np
import pytest

from deltafl.rules.task_arithmetic import TaskArithmetic
from rules.reference import apply, assert_close, rows, shares


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_is_the_weighted_mean(weights):
    deltas = rows(3)
    assert_close(apply(TaskArithmetic(), deltas, weights), shares(weights, 3) @ deltas)


def test_a_negative_weight_subtracts():
    deltas = rows(2)
    assert_close(apply(TaskArithmetic(), deltas, [1.0, -3.0]), np.array([0.25, -0.75]) @ deltas)
