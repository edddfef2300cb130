import numpy as np
import pytest

from deltafl.errors import DeltaflError
from deltafl.rules.fedavg import FedAvg
from rules.reference import apply, assert_close, rows

EXAMPLES = [100, 300, 1600]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 1.0, 0.5]])
def test_weighs_by_the_number_of_examples(weights):
    deltas = rows(3)
    share = np.array(EXAMPLES) * weights
    assert_close(
        apply(FedAvg(), deltas, weights, num_examples=EXAMPLES), share @ deltas / share.sum()
    )


@pytest.mark.parametrize("missing", [None, 0, -5])
def test_a_missing_number_of_examples_names_model_and_flag(missing):
    with pytest.raises(DeltaflError, match=r'model "m1".*--num-examples') as error:
        apply(FedAvg(), rows(3), num_examples=[10, missing, 30])
    assert len(error.value.problems) == 1
