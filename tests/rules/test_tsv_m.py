import numpy as np
import pytest

from deltafl.rules.tsv_m import TSVMerge
from rules.oracle import KINDS, assert_is, merge, models, polar, svd


def expected(matrices: list[np.ndarray], p: np.ndarray) -> np.ndarray:
    """Triples of each matrix, concatenated, U and V replaced by their polar factors."""
    rank = max(1, min(matrices[0].shape) // len(matrices))
    us, ss, vs = zip(*((x[..., :rank] for x in svd(m)) for m in matrices), strict=True)
    sizes = np.concatenate([w * s for w, s in zip(p, ss, strict=True)])
    return polar(np.hstack(us)) @ np.diag(sizes) @ polar(np.hstack(vs)).T


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_formula(kind, n):
    assert_is(TSVMerge(), models(n, kind), expected)
    assert_is(TSVMerge(), models(n, kind), expected, [1.0, 2.0, 0.5, *[1.0] * 5][:n])


def test_equal_deltas_give_their_leading_directions_once():
    """Not n times, and not in random directions: the sum over n models of the k leading triples."""
    deltas = models(3, "equal")
    u, s, v = svd(deltas[0]["square"])
    found = merge(TSVMerge(), deltas)["square"]
    np.testing.assert_allclose(found, u[:, :2] * s[:2] / 3 @ v[:, :2].T, atol=1e-12)
