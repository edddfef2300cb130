from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from deltafl.algebra.deltas import Deltas, Update
from deltafl.algebra.reductions import gram_matrix, magnitude_thresholds
from deltafl.algebra.streaming import CHUNK
from deltafl.rules.rule import Source, Threshold
from deltafl.rules.weights import as_weights
from laws.worlds import flatten, make


def rows_of(*deltas: Mapping[str, Tensor]) -> Deltas:
    updates = [Update(d, Source(f"m{i}")) for i, d in enumerate(deltas)]
    return Deltas(updates, as_weights(None, len(updates)))


def assert_keeps(threshold: Threshold, values: Tensor, k: int) -> None:
    """The k largest magnitudes by a stable sort, so of equal ones the first, are kept."""
    magnitudes = values.abs().float().numpy()
    kept = magnitudes > threshold.value
    kept |= (magnitudes == threshold.value) & (np.arange(len(values)) < threshold.stop)
    wanted = np.argsort(-magnitudes, kind="stable")[:k]
    assert kept.sum() == k
    assert kept[wanted].all()


def adversarial() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(10_000, generator=draw)
    return {
        "normal": normal,
        "constant": torch.full((1000,), -0.25),
        "zero": torch.zeros(1000),
        "mostly zero": torch.where(normal.abs() > 2, normal, 0.0),
        "duplicates": torch.randint(-3, 4, (5000,), generator=draw).float(),
        "bfloat16": normal.bfloat16(),
        "every binade": 2.0 ** torch.arange(-149, 128).double().float(),
        "subnormal": torch.arange(1.0, 300.0) * 2.0**-149,
        "largest": torch.tensor([3.4028235e38, -3.4028235e38, 1.0, 0.0]),
        "neighbours": torch.arange(5000, dtype=torch.int32).add(0x3F800000).view(torch.float32),
        "two far apart": torch.tensor([1e-38] * 500 + [1e38] * 500),
        "one": torch.tensor([-3.0]),
        "unlike what a sample sees": torch.randn(700_000, generator=draw).sort().values.exp(),
        "units": torch.randn(CHUNK + 12345, generator=draw).bfloat16(),
    }


ADVERSARIAL = adversarial()


@pytest.mark.parametrize("density", [0.0, 1e-3, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_the_threshold_keeps_what_is_first_in_a_sort(kind, density):
    values = ADVERSARIAL[kind]
    k = max(1, int(density * len(values))) if density else 0
    for per_tensor, threads in ((False, 2 if kind == "units" else 1), (True, 1)):
        deltas = rows_of({"w": values})
        thresholds, kept = magnitude_thresholds(deltas, density, per_tensor, threads)
        assert_keeps(thresholds["w"][0], values, k)
        assert kept == [k / len(values)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.6])
def test_of_equal_values_in_many_tensors_the_first_are_kept(density, threads):
    """Of as many units as there are groups, and more."""
    draw = torch.Generator().manual_seed(1)
    sizes = [5, 0, CHUNK, 3 * CHUNK + 17, 1, 15 * CHUNK]
    values = torch.randint(-3, 4, (sum(sizes),), generator=draw, dtype=torch.int8)
    parts = {f"t{i}": part.half() for i, part in enumerate(values.split(sizes))}
    deltas = rows_of({n: -t for n, t in parts.items()}, parts)
    thresholds, kept = magnitude_thresholds(deltas, density, False, threads)
    k = int(density * len(values))
    assert kept == [k / len(values)] * 2
    (first, start), magnitudes = (thresholds["t0"][1], 0), values.abs()
    above, equal = magnitudes > first.value, (magnitudes == first.value).nonzero()[:, 0]
    assert first.stop == int(equal[k - int(above.sum()) - 1]) + 1
    for name, part in parts.items():
        assert thresholds[name] == [Threshold(first.value, first.stop - start)] * 2
        start += len(part)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_count_as_largest_and_end_the_search(value):
    """The rule refuses them later, with the model's name; here they must not hang or hide."""
    deltas = rows_of({"w": torch.tensor([value, 1.0, 2.0, value])})
    thresholds, kept = magnitude_thresholds(deltas, 0.75, per_tensor=False)
    assert (thresholds["w"][0], kept[0]) == (Threshold(2.0, 3), 0.75)
    for per_tensor in (False, True):
        found, _ = magnitude_thresholds(deltas, 0.5, per_tensor=per_tensor)
        assert found["w"][0] == Threshold(np.inf, 4)


@pytest.mark.parametrize("scale", [1e-3, 1e30])
@pytest.mark.parametrize("threads", [1, 2])
def test_gram_matrix_is_the_one_of_numpy(threads, scale):
    """Squares of 1e30 overflow float32."""
    world = make(5, seed=2, scale=scale)
    flat = np.stack([flatten(d).double().numpy() for d in world.deltas])
    gram, wanted = gram_matrix(rows_of(*world.deltas), threads), flat @ flat.T
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    # Any order of 69 additions in float64 stays within 69 roundings of the norms.
    np.testing.assert_allclose(gram.numpy(), wanted, rtol=0, atol=69 * 2**-53 * np.trace(wanted))


@pytest.mark.parametrize("threads", [1, 2])
def test_gram_matrix_does_not_depend_on_the_order_of_the_tensors(threads):
    """One by one after the large one, every 1 would be lost: the spacing at 2^54 is 4."""
    ones = {f"t{i}": torch.tensor([1.0]) for i in range(8)}
    deltas = [{"large": torch.tensor([2.0**27]), **ones}] * 2
    there = gram_matrix(rows_of(*deltas), threads)
    back = gram_matrix(rows_of(*[dict(reversed(d.items())) for d in deltas]), threads)
    assert torch.equal(there, back)
    assert there[0, 1] == 2.0**54 + 8
