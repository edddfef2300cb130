from itertools import pairwise

import pytest
import torch

from deltafl.errors import DeltaflError
from deltafl.sparse.calibration import calibrate
from deltafl.sparse.masks import choose_mask
from deltafl.sparse.recipe import SparseRecipe

ABLE = {"a": torch.ones(50, dtype=torch.bool), "b": torch.arange(60).reshape(6, 10) % 3 != 0}
TOTAL = 50 + 40


def scores_of(r: int):
    draw = torch.Generator().manual_seed(r)
    return {n: torch.rand(able.shape, generator=draw) for n, able in ABLE.items()}


WEIGHTS = scores_of(9)


def run(kind, rounds, score, strategy="least_sensitive", scope="global"):
    recipe = SparseRecipe.of(
        calibration=kind,
        calibration_rounds=rounds,
        mask_strategy=strategy,
        sparsity_ratio=0.8,
        mask_scope=scope,
    )
    return calibrate(recipe, score, WEIGHTS, ABLE, torch.Generator().manual_seed(0))


def plain(values, strategy="least_sensitive", scope="global", keep=1 - 0.8):
    generator = torch.Generator().manual_seed(0)
    return choose_mask(strategy, values, ABLE, keep=keep, scope=scope, generator=generator)


def same(one, two) -> bool:
    return all(torch.equal(one[n], two[n]) for n in ABLE)


class Recorder:
    def __init__(self, score=scores_of) -> None:
        self.calls, self.score = [], score

    def __call__(self, r):
        self.calls.append(r)
        return self.score(r)


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_average_is_one_threshold_on_the_mean(scope):
    score = Recorder()
    mask = run("average", 4, score, scope=scope)
    mean = {n: sum(scores_of(r)[n].double() for r in range(4)) / 4 for n in ABLE}
    assert same(mask, plain(mean, scope=scope))
    assert not same(mask, plain(scores_of(0), scope=scope))
    assert score.calls == list(range(4))


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("strategy", ["least_sensitive", "most_sensitive"])
def test_progressive_masks_are_nested_and_shrink_on_schedule(strategy, scope, monkeypatch):
    rounds, keep, masks = 5, 1 - 0.8, []

    def recorded(*args, **kwargs):
        masks.append(choose_mask(*args, **kwargs))
        return masks[-1]

    monkeypatch.setattr("deltafl.sparse.calibration.choose_mask", recorded)
    score = Recorder()
    run("progressive", rounds, score, strategy, scope=scope)
    assert score.calls == list(range(rounds))
    assert len(masks) == rounds
    for r, mask in enumerate(masks, 1):
        if scope == "global":
            kept = sum(int(m.sum()) for m in mask.values())
            assert kept == round(keep ** (r / rounds) * TOTAL)
        else:
            for n in ABLE:
                assert int(mask[n].sum()) == round(keep ** (r / rounds) * int(ABLE[n].sum()))
        assert not (mask["b"] & ~ABLE["b"]).any()
    for larger, smaller in pairwise(masks):
        assert all((smaller[n] <= larger[n]).all() for n in ABLE)


def test_what_was_dropped_never_returns():
    """Later rounds score 0 (pruned weights look insensitive), or NaN, wherever the first one dropped."""
    first = plain(scores_of(0), keep=0.2 ** (1 / 3))
    for value in (0, torch.nan):

        def score(r, value=value):
            if r == 0:
                return scores_of(0)
            return {n: torch.where(first[n], scores_of(r)[n] + 1, value) for n in ABLE}

        mask = run("progressive", 3, score)
        assert sum(int(m.sum()) for m in mask.values()) == round(0.2 * TOTAL)
        assert not any((mask[n] & ~first[n]).any() for n in ABLE)


@pytest.mark.parametrize("kind", ["average", "progressive"])
@pytest.mark.parametrize("strategy", ["lowest_magnitude", "highest_magnitude", "random"])
def test_strategies_without_scores_never_score(kind, strategy):
    def score(r):
        raise AssertionError("scored")

    assert same(run(kind, 4, score, strategy), plain(WEIGHTS, strategy=strategy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": "averge"}, 'did you mean "average"'),
        ({"calibration_rounds": 0}, "greater than or equal to 1"),
        ({"sparsity_ratio": 1.0}, "less than 1"),
        ({"mask_strategy": "least_sensitve"}, 'did you mean "least_sensitive"'),
        ({"fisher_labels": "exact"}, "known: empirical, sampled"),
        ({"mask_file": "m", "sparsity_ratio": 0.5}, "give one of them"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(DeltaflError, match=message):
        SparseRecipe.of(**change)


def test_scores_are_needed_where_a_mask_is_made_by_them():
    made = SparseRecipe.of(sparsity_ratio=0.9)
    assert (made.is_sparse, made.is_calibrated) == (True, True)
    assert not made.replace(mask_strategy="random").is_calibrated
    assert not SparseRecipe.of(mask_file="m").is_calibrated
    assert not SparseRecipe().is_sparse
