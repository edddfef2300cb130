import numpy as np
import pytest

from deltafl.rules.iso import IsoC, IsoCTS
from rules.oracle import KINDS, assert_is, models, polar, svd


def mixed(matrices: list[np.ndarray], p: np.ndarray) -> np.ndarray:
    return np.einsum("n,noi->oi", p, np.array(matrices))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_iso_c_bends_the_spectrum_of_the_sum(kind, power):
    def expected(matrices, p):
        u, s, v = svd(mixed(matrices, p))
        return u @ np.diag(s**power * s.sum() / (s**power).sum()) @ v.T

    assert_is(IsoC(power), models(3, kind), expected)
    assert_is(IsoC(power), models(1, kind), expected)
    assert_is(IsoC(power), models(3, kind), expected, [1.0, 2.0, 0.5])


def cts(matrices: list[np.ndarray], p: np.ndarray, share: float) -> np.ndarray:
    """Iso-CTS with numpy's SVD; the common directions last, as in the paper's code."""
    size, n = min(matrices[0].shape), len(matrices)
    own = round((size - int(size * share)) / n)
    own -= own * n > size
    common = svd(mixed(matrices, p))
    u, s, v = (x[..., : size - own * n] for x in common)
    us, ss, vs = [], [], []
    for weight, matrix in zip(p, matrices, strict=True):
        a, b, c = svd(weight * (matrix - u @ u.T @ matrix))
        us.append(a[:, :own]), ss.append(b[:own]), vs.append(c[:, :own])
    u, s, v = np.hstack([*us, u]), np.concatenate([*ss, s]), np.hstack([*vs, v])
    kept = s > 1e-6 * np.linalg.norm(s)
    if not kept.any():
        return 0 * matrices[0]
    return s[kept].mean() * polar(u[:, kept]) @ polar(v[:, kept]).T


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_iso_cts_keeps_common_and_own_directions(kind, share):
    for n in (1, 2, 3):
        assert_is(IsoCTS(share), models(n, kind), lambda m, p: cts(m, p, share))
    assert_is(IsoCTS(share), models(3, kind), lambda m, p: cts(m, p, share), [1.0, 2.0, 0.5])
