from itertools import pairwise

import pytest
import torch

from checkpoint_files import fails
from deltafl.sparse.masks import calibrate, choose_mask
from deltafl.sparse.recipe import SparseRecipe

ABLE = {"a": torch.ones(50, dtype=torch.bool), "b": torch.arange(60).reshape(6, 10) % 3 != 0}
TOTAL = 50 + 40


def scores_of(r: int):
    draw = torch.Generator().manual_seed(r)
    return {n: torch.rand(able.shape, generator=draw) for n, able in ABLE.items()}


WEIGHTS = scores_of(9)


def run(kind, rounds, score, strategy="least_sensitive", scope="global"):
    settings = {"calibration": kind, "calibration_rounds": rounds, "sparsity_ratio": 0.8}
    recipe = SparseRecipe.of(**settings, mask_strategy=strategy, mask_scope=scope)
    return calibrate(recipe, score, WEIGHTS, ABLE, torch.Generator().manual_seed(0))


def plain(values, strategy="least_sensitive", scope="global", keep=1 - 0.8):
    generator = torch.Generator().manual_seed(0)
    return choose_mask(strategy, values, ABLE, keep=keep, scope=scope, generator=generator)


def same(one, two) -> bool:
    return all(torch.equal(one[n], two[n]) for n in ABLE)


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_average_is_one_threshold_on_the_mean(scope):
    calls = []
    mask = run("average", 4, lambda r: calls.append(r) or scores_of(r), scope=scope)
    mean = {n: sum(scores_of(r)[n].double() for r in range(4)) / 4 for n in ABLE}
    assert same(mask, plain(mean, scope=scope))
    assert not same(mask, plain(scores_of(0), scope=scope))
    assert calls == list(range(4))


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("strategy", ["least_sensitive", "most_sensitive"])
def test_progressive_masks_are_nested_and_shrink_on_schedule(strategy, scope, monkeypatch):
    rounds, keep, masks, calls = 5, 1 - 0.8, [], []

    def recorded(*args, **kwargs):
        masks.append(choose_mask(*args, **kwargs))
        return masks[-1]

    monkeypatch.setattr("deltafl.sparse.masks.choose_mask", recorded)
    run("progressive", rounds, lambda r: calls.append(r) or scores_of(r), strategy, scope=scope)
    assert calls == list(range(rounds))
    assert len(masks) == rounds
    for r, mask in enumerate(masks, 1):
        counts, sizes = ([int(m.sum()) for m in held.values()] for held in (mask, ABLE))
        if scope == "global":
            counts, sizes = [sum(counts)], [TOTAL]
        assert counts == [round(keep ** (r / rounds) * size) for size in sizes]
        assert not (mask["b"] & ~ABLE["b"]).any()
    for larger, smaller in pairwise(masks):
        assert all((smaller[n] <= larger[n]).all() for n in ABLE)


@pytest.mark.parametrize("value", [0, torch.nan])
def test_what_was_dropped_never_returns(value):
    """Later rounds score 0 (pruned weights look insensitive), or NaN, wherever the first one dropped."""
    first = plain(scores_of(0), keep=0.2 ** (1 / 3))

    def score(r):
        later = {n: torch.where(first[n], scores_of(r)[n] + 1, value) for n in ABLE}
        return later if r else scores_of(0)

    mask = run("progressive", 3, score)
    assert sum(int(m.sum()) for m in mask.values()) == round(0.2 * TOTAL)
    assert not any((mask[n] & ~first[n]).any() for n in ABLE)


@pytest.mark.parametrize("kind", ["average", "progressive"])
@pytest.mark.parametrize("strategy", ["lowest_magnitude", "highest_magnitude", "random"])
def test_strategies_without_scores_never_score(kind, strategy):
    mask = run(kind, 4, lambda r: pytest.fail("scored"), strategy)
    assert same(mask, plain(WEIGHTS, strategy=strategy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": "averge"}, 'did you mean "average"'),
        ({"calibration_rounds": 0}, "greater than or equal to 1"),
        ({"fisher_labels": "exact"}, "known: empirical, sampled"),
        ({"sparsity_ratio": 1.0}, "sparsity_ratio: must be less than 1"),
        ({"mask_file": "m", "sparsity_ratio": 0.5}, "give one of them"),
    ],
)
def test_mistakes_are_named(change, message):
    fails(message, SparseRecipe.of, **change)
